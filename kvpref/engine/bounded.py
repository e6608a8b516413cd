"""The bounded schedule: forward and backward of an optimizer step, a chunk of tokens at a time.

Parents run before children, without a graph, and leave keys and values in slabs. The loss is computed from the
log-probs alone; its gradient with respect to each is that token's weight. Then chunks run again, children before
parents, each with its own graph, whose backward pass adds to the gradients of the slabs that it read; there a parent
finds everything its descendants left. The vision tower does the same, running first, and again last. This is gradient
caching (Gao et al. 2021, arXiv 2101.06983) for prefix trees. The last chunks of a forward pass keep their graphs, as
many as the bound allows, and do not run twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kvpref.engine.chunk_program import ChunkOutput, ChunkSettings, run_chunk
from kvpref.engine.image_chunks import StepImages
from kvpref.engine.lockstep import Lockstep, Rounds
from kvpref.engine.options import EngineOptions
from kvpref.engine.passes import responses
from kvpref.engine.router_balance import StepBalance
from kvpref.errors import UnsupportedModelError
from kvpref.models.compilation import is_compiled
from kvpref.models.positions import check_tokens
from kvpref.models.rotary import check_lengths
from kvpref.models.support import check_training_state, unwrap
from kvpref.parallel.sequence import check_options
from kvpref.parallel.wrapping import wrapper_of
from kvpref.plan.chunks import ChunkPlan
from kvpref.plan.step import Step
from kvpref.prefix.slab_reads import SHARED
from kvpref.records.outputs import WITHOUT_GRAD
from kvpref.records.requests import HeadOptions
from kvpref.state.recurrent import Incoming
from kvpref.state.slabs import SlabStore
from kvpref.tracing import mark, region

Evaluate = Callable[[int, Any, torch.Tensor | None], None]
"""Called with the number of a micro-batch, its log-probs (or rewards) and its load-balancing loss if requested. Leaves
the loss's gradient in the leaves that these are made from."""


def run_chunks(model: nn.Module, step: Step, evaluate: Evaluate, options: EngineOptions, head: HeadOptions) -> None:
    """Add the gradients of an optimizer step's losses to the parameters' `.grad`.

    Args:
        model: Attached, possibly wrapped; all ranks of a sharded model run equally many micro-batches.
        step: The micro-batches.
        evaluate: Computes the loss of one micro-batch and runs its backward pass down to the log-probs.
        options: The bound, where keys and values are kept, and checkpointing.
        head: What the head computes.
    """
    _ChunkRunner(model, step, options, head).run(evaluate)


@torch.no_grad()
def score_chunks(model: nn.Module, step: Step, options: EngineOptions, head: HeadOptions) -> Any:
    """The log-probs or rewards of a step of one micro-batch, without gradient."""
    return _ChunkRunner(model, step, options, head).score()


@dataclass(kw_only=True)
class _ChunkGraph:
    """What is kept of a chunk's forward pass for its backward pass."""

    output: ChunkOutput
    """The chunk's results."""

    incoming: tuple[Incoming, ...] = ()
    """The gradients of its keys, values and states, and where they enter the graph; not the tensors themselves, which
    would then stay in memory."""


class _ChunkRunner:
    """The state of one optimizer step while it runs."""

    def __init__(self, model: nn.Module, step: Step, options: EngineOptions, head: HeadOptions) -> None:
        self._model, self._step, self._options = model, step, options
        self._wrapper = wrapper_of(model, options.sharding)
        self._device = step.batches[0].device
        on_host = options.prefix_cache == "cpu" and moves_to_host(self._device)
        if on_host and is_compiled(unwrap(model)):
            raise UnsupportedModelError(
                "prefix_cache='cpu' would recompile each layer, because each receives different keys and values; "
                "use prefix_cache='device', or leave out compile_layers"
            )
        check_options(
            model,
            mode=options.mode,
            has_images=bool(step.chunks.images),
            balances_experts=options.router_aux_loss_coef is not None,
        )
        groups = [group for batch in step.batches for group in batch.groups]
        check_lengths(unwrap(model), groups)
        check_tokens(unwrap(model), groups)
        self._images = StepImages(self._wrapper, step, options)
        self._settings = ChunkSettings(
            num_positions=step.chunks.max_sequence_tokens,
            options=options,
            head=head,
            adds_in_place=self._wrapper.adds_in_place,
            needs_output=self._wrapper.is_lockstep,
            images=self._images.passes,
        )
        self._lockstep = Lockstep(self._wrapper, self._device, options, head)
        self._store = SlabStore(step.chunks, self._device, on_host=on_host, prompts_get_grad=options.prefix_grad)
        self._graphs: dict[ChunkPlan, _ChunkGraph] = {}
        balances = options.router_aux_loss_coef is not None
        self._balance = StepBalance(len(step.batches)) if balances else None
        # The head's outputs for every unique row, and the loss's gradient with respect to them.
        self._outputs: dict[str, torch.Tensor] = {}
        self._weights: dict[str, torch.Tensor] = {}
        if step.batches[0].reads.kind == "tokens":
            dtype = torch.promote_types(next(unwrap(model).parameters()).dtype, torch.float32)
            self._make_room("token_logps", torch.empty(0, dtype=dtype, device=self._device))

    def run(self, evaluate: Evaluate) -> None:
        check_training_state(unwrap(self._model))
        chunks = self._step.chunks
        with closing(self._store), self._wrapper.step(trains=True):
            self._images.forward(keep_graph=True)
            shared, *rounds = self._rounds()
            self._forward(chunks.shared, shared)
            for index, micro_batch in enumerate(chunks.micro_batches):
                self._forward(micro_batch.chunks, rounds[index])
                self._weigh(index, evaluate)
                self._backward(micro_batch.chunks, rounds[index])
                self._store.drop(index)
            self._backward(chunks.shared, shared)
            self._store.drop(SHARED)
            self._images.backward()

    def score(self) -> Any:
        check_training_state(unwrap(self._model))
        (micro_batch,) = self._step.chunks.micro_batches
        with closing(self._store), self._wrapper.step(trains=False):
            self._images.forward(keep_graph=False)
            (rounds,) = self._lockstep.agree([Rounds(forward=len(micro_batch.chunks))])
            self._forward(micro_batch.chunks, rounds)
        return self._responses(0, self._outputs)

    def _rounds(self) -> list[Rounds]:
        """The rounds of the shared chunks, and of each micro-batch's."""
        chunks, limit = self._step.chunks, self._images.chunk_tokens
        own = [self._own_rounds(chunks.shared, num_kept=0)]
        for micro_batch in chunks.micro_batches:
            own.append(self._own_rounds(micro_batch.chunks, num_kept=_num_last(micro_batch.chunks, limit)))
        return self._lockstep.agree(own)

    def _own_rounds(self, chunks: Sequence[ChunkPlan], *, num_kept: int) -> Rounds:
        kept = chunks[len(chunks) - num_kept :]
        gets_grad = self._gets_grad
        return Rounds(forward=len(chunks), backward=sum(map(gets_grad, chunks)), kept=sum(map(gets_grad, kept)))

    def _forward(self, chunks: Sequence[ChunkPlan], rounds: Rounds) -> None:
        self._lockstep.forward(rounds.forward - len(chunks))
        with_grad = [chunk for chunk in chunks if self._gets_grad(chunk)]
        kept = set(with_grad[len(with_grad) - rounds.kept :])
        for chunk in chunks:
            with torch.set_grad_enabled(chunk in kept), region(f"pass {chunk.depth}"):
                graph = self._run(chunk, writes=True)
            output = graph.output
            for name, values in output.rows.items():
                if name not in self._outputs:
                    self._make_room(name, values)
                self._outputs[name][chunk.logp_index] = values.detach()
            if self._balance is not None and output.routers is not None:
                self._balance.add(chunk, output.routers)
            if chunk in kept:
                self._graphs[chunk] = graph

    def _make_room(self, name: str, like: torch.Tensor) -> None:
        """Allocate an output of all U rows, and its gradient."""
        self._outputs[name] = like.new_zeros(self._step.chunks.num_logps, *like.shape[1:])
        self._weights[name] = torch.zeros_like(self._outputs[name])
        mark("log-probs", self._outputs[name], self._weights[name])

    def _responses(self, index: int, outputs: dict[str, torch.Tensor]) -> Any:
        return responses(outputs, self._step.chunks.micro_batches[index], self._step.batches[index])

    def _weigh(self, index: int, evaluate: Evaluate) -> None:
        """Compute the weight of each output in the loss of a micro-batch."""
        leaves = {
            name: values.detach().clone().requires_grad_(name not in WITHOUT_GRAD)
            for name, values in self._outputs.items()
        }
        balance_loss = None if self._balance is None else self._balance.loss(index)
        evaluate(index, self._responses(index, leaves), balance_loss)
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                self._weights[name] += leaf.grad

    def _backward(self, chunks: Sequence[ChunkPlan], rounds: Rounds) -> None:
        with_grad = [chunk for chunk in chunks if self._gets_grad(chunk)]
        for chunk in reversed(with_grad):
            graph = self._graphs.pop(chunk, None)
            if graph is None:
                with torch.enable_grad(), region(f"recompute pass {chunk.depth}"):
                    graph = self._run(chunk, writes=False)
            with region(f"backward pass {chunk.depth}"):
                self._backward_of(chunk, graph)
        self._lockstep.backward(rounds.backward - len(with_grad))

    def _gets_grad(self, chunk: ChunkPlan) -> bool:
        return self._options.prefix_grad or not chunk.is_prompt

    def _run(self, chunk: ChunkPlan, *, writes: bool) -> _ChunkGraph:
        key_values = self._store.key_values(chunk)
        program = partial(run_chunk, chunk=chunk, key_values=key_values, settings=self._settings)
        graph = _ChunkGraph(output=self._wrapper.run_chunk(program))
        if chunk.writes is not None:
            if writes:
                self._store.write(chunk.writes, key_values.own)
                key_values.recurrent.write()
            if torch.is_grad_enabled():
                graph.incoming = (key_values.incoming(), key_values.recurrent.incoming())
        return graph

    def _backward_of(self, chunk: ChunkPlan, graph: _ChunkGraph) -> None:
        roots: list[GradientEdge] = []
        grads: list[torch.Tensor] = []
        output = graph.output
        for name, values in output.rows.items():
            if values.requires_grad:
                roots.append(get_gradient_edge(values))
                grads.append(self._weights[name][chunk.logp_index])
        if output.anchor is not None and output.anchor.requires_grad:
            roots.append(get_gradient_edge(output.anchor))
            grads.append(torch.zeros_like(output.anchor))
        for edge, grad in chain.from_iterable(incoming() for incoming in graph.incoming):
            roots.append(edge)
            grads.append(grad)
        if self._balance is not None and output.routers is not None and output.routers.probabilities.requires_grad:
            edge, grad = self._balance.roots(chunk, output.routers)
            roots.append(edge)
            grads.append(grad)
        if roots:
            torch.autograd.backward(roots, grads)


def moves_to_host(device: torch.device) -> bool:
    """Whether the model's memory is not host memory."""
    return device.type != "cpu"


def _num_last(chunks: Sequence[ChunkPlan], max_tokens: int | None) -> int:
    """How many of the last chunks together have at most `max_tokens` tokens."""
    total = 0
    for number, chunk in enumerate(reversed(chunks)):
        total += chunk.num_tokens
        if max_tokens is not None and total > max_tokens:
            return number
    return len(chunks)
