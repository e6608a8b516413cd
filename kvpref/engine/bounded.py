"""The bounded schedule: forward and backward of an optimizer step, a chunk of tokens at a time.

Parents run before children, without a graph, and leave keys and values in slabs. The loss is computed from the
log-probs alone; its gradient with respect to each is that token's weight. Then chunks run again, children before
parents, each with a graph of its own whose backward pass adds to the gradients of the slabs that it read; so a parent
finds there all that its descendants leave. So does the vision tower, which runs first, and again last. This is gradient
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
from transformers import PreTrainedModel

from kvpref.engine.image_chunks import StepImages
from kvpref.engine.level_pass import run_level_pass
from kvpref.engine.options import EngineOptions
from kvpref.engine.passes import responses
from kvpref.engine.router_balance import StepBalance
from kvpref.errors import UnsupportedModelError
from kvpref.models.attach import run_inside
from kvpref.models.checkpointing import checkpointed, checkpoints_pass
from kvpref.models.compilation import is_compiled
from kvpref.models.experts import RouterSums, RouterTally
from kvpref.models.head import head_outputs
from kvpref.models.positions import check_tokens
from kvpref.models.precision import without_cast_cache
from kvpref.models.rotary import check_lengths
from kvpref.models.support import check_training_state, unwrap
from kvpref.models.text_layers import PassExtras
from kvpref.models.vision.merging import PassImages
from kvpref.models.vocabulary_grads import embed
from kvpref.plan.chunks import ChunkPlan
from kvpref.plan.occurrences import row_counts
from kvpref.plan.step import Step
from kvpref.prefix.slab_reads import SHARED
from kvpref.records.outputs import WITHOUT_GRAD
from kvpref.records.requests import HeadOptions
from kvpref.state.recurrent import Incoming
from kvpref.state.slabs import ChunkKeyValues, SlabStore
from kvpref.tracing import mark, region

Evaluate = Callable[[int, Any, torch.Tensor | None], None]
"""Called with the number of a micro-batch, its log-probs (or rewards) and its load-balancing loss where that is asked
for; they are made of leaves, in which it leaves the loss's gradient."""


def run_chunks(model: nn.Module, step: Step, evaluate: Evaluate, options: EngineOptions, head: HeadOptions) -> None:
    """Add the gradients of an optimizer step's losses to the parameters' `.grad`.

    Args:
        model: Attached; not one of the wrappers that synchronise gradients in their forward.
        step: The micro-batches.
        evaluate: Computes the loss of one micro-batch and runs its backward pass down to the log-probs.
        options: Bound, placement of keys and values, checkpointing.
        head: What the head computes.
    """
    _ChunkRunner(model, step, options, head).run(evaluate)


@torch.no_grad()
def score_chunks(model: nn.Module, step: Step, options: EngineOptions, head: HeadOptions) -> Any:
    """The log-probs or rewards of a step of one micro-batch, without gradient."""
    return _ChunkRunner(model, step, options, head).score()


@dataclass(kw_only=True)
class _ChunkGraph:
    """What is left of a chunk's forward pass, for its backward pass."""

    outputs: dict[str, torch.Tensor]
    """What the head makes of its P predictor rows, by name; empty if there are none."""

    routers: RouterSums | None = None
    """Its share in the sums of the load-balancing loss."""

    incoming: tuple[Incoming, ...] = ()
    """The gradients of its keys and values, of its states, and where they enter the graph; not the tensors, which would
    stay."""


class _ChunkRunner:
    """One optimizer step in the making."""

    def __init__(self, model: nn.Module, step: Step, options: EngineOptions, head: HeadOptions) -> None:
        self._model, self._step, self._options, self._head = model, step, options, head
        self._device = step.batches[0].device
        on_host = options.prefix_cache == "cpu" and moves_to_host(self._device)
        if on_host and is_compiled(unwrap(model)):
            raise UnsupportedModelError(
                "prefix_cache='cpu' would compile each layer anew, because each is brought keys and values of its own; "
                "use prefix_cache='device', or leave out compile_layers"
            )
        groups = [group for batch in step.batches for group in batch.groups]
        check_lengths(unwrap(model), groups)
        check_tokens(unwrap(model), groups)
        self._images = StepImages(model, step, options)
        self._store = SlabStore(step.chunks, self._device, on_host=on_host, prompts_get_grad=options.prefix_grad)
        self._graphs: dict[ChunkPlan, _ChunkGraph] = {}
        balances = options.router_aux_loss_coef is not None
        self._balance = StepBalance(len(step.batches)) if balances else None
        # What the head made of every unique row, and the loss's gradient with respect to it.
        self._outputs: dict[str, torch.Tensor] = {}
        self._weights: dict[str, torch.Tensor] = {}
        if step.batches[0].reads.kind == "tokens":
            dtype = torch.promote_types(next(unwrap(model).parameters()).dtype, torch.float32)
            self._make_room("token_logps", torch.empty(0, dtype=dtype, device=self._device))

    def run(self, evaluate: Evaluate) -> None:
        check_training_state(unwrap(self._model))
        chunks = self._step.chunks
        with closing(self._store):
            self._images.forward(keep_graph=True)
            self._forward(chunks.shared, keep_graphs=False)
            for index, micro_batch in enumerate(chunks.micro_batches):
                self._forward(micro_batch.chunks, keep_graphs=True)
                self._weigh(index, evaluate)
                self._backward(micro_batch.chunks)
                self._store.drop(index)
            self._backward(chunks.shared)
            self._store.drop(SHARED)
            self._images.backward()

    def score(self) -> Any:
        check_training_state(unwrap(self._model))
        (micro_batch,) = self._step.chunks.micro_batches
        with closing(self._store):
            self._images.forward(keep_graph=False)
            self._forward(micro_batch.chunks, keep_graphs=False)
        return self._responses(0, self._outputs)

    def _forward(self, chunks: Sequence[ChunkPlan], *, keep_graphs: bool) -> None:
        num_without = _num_before_last(chunks, self._images.chunk_tokens) if keep_graphs else len(chunks)
        for index, chunk in enumerate(chunks):
            with_graph = index >= num_without and self._gets_grad(chunk)
            with torch.set_grad_enabled(with_graph), region(f"pass {chunk.depth}"):
                graph = self._run(chunk, writes=True)
            for name, values in graph.outputs.items():
                if name not in self._outputs:
                    self._make_room(name, values)
                self._outputs[name][chunk.logp_index] = values.detach()
            if self._balance is not None and graph.routers is not None:
                self._balance.add(chunk, graph.routers)
            if with_graph:
                self._graphs[chunk] = graph

    def _make_room(self, name: str, like: torch.Tensor) -> None:
        """Room for an output of all U rows, and for its gradient."""
        self._outputs[name] = like.new_zeros(self._step.chunks.num_logps, *like.shape[1:])
        self._weights[name] = torch.zeros_like(self._outputs[name])
        mark("log-probs", self._outputs[name], self._weights[name])

    def _responses(self, index: int, outputs: dict[str, torch.Tensor]) -> Any:
        return responses(outputs, self._step.chunks.micro_batches[index], self._step.batches[index])

    def _weigh(self, index: int, evaluate: Evaluate) -> None:
        """Find the weight of each output in the loss of a micro-batch."""
        leaves = {
            name: values.detach().clone().requires_grad_(name not in WITHOUT_GRAD)
            for name, values in self._outputs.items()
        }
        balance_loss = None if self._balance is None else self._balance.loss(index)
        evaluate(index, self._responses(index, leaves), balance_loss)
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                self._weights[name] += leaf.grad

    def _backward(self, chunks: Sequence[ChunkPlan]) -> None:
        for chunk in reversed(chunks):
            if not self._gets_grad(chunk):
                continue
            graph = self._graphs.pop(chunk, None)
            if graph is None:
                with torch.enable_grad(), region(f"recompute pass {chunk.depth}"):
                    graph = self._run(chunk, writes=False)
            with region(f"backward pass {chunk.depth}"):
                self._backward_of(chunk, graph)

    def _gets_grad(self, chunk: ChunkPlan) -> bool:
        return self._options.prefix_grad or not chunk.is_prompt

    def _run(self, chunk: ChunkPlan, *, writes: bool) -> _ChunkGraph:
        key_values = self._store.key_values(chunk)
        program = partial(
            _run_chunk,
            chunk=chunk,
            key_values=key_values,
            num_positions=self._step.chunks.max_sequence_tokens,
            options=self._options,
            head=self._head,
            images=self._images.passes,
        )
        outputs, routers = run_inside(self._model, program)
        graph = _ChunkGraph(outputs=outputs, routers=routers)
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
        for name, values in graph.outputs.items():
            if values.requires_grad:
                roots.append(get_gradient_edge(values))
                grads.append(self._weights[name][chunk.logp_index])
        for edge, grad in chain.from_iterable(incoming() for incoming in graph.incoming):
            roots.append(edge)
            grads.append(grad)
        if self._balance is not None and graph.routers is not None and graph.routers.probabilities.requires_grad:
            edge, grad = self._balance.roots(chunk, graph.routers)
            roots.append(edge)
            grads.append(grad)
        if roots:
            torch.autograd.backward(roots, grads)


def moves_to_host(device: torch.device) -> bool:
    """Whether host memory is another memory than the model's."""
    return device.type != "cpu"


def _run_chunk(
    model: PreTrainedModel,
    *,
    chunk: ChunkPlan,
    key_values: ChunkKeyValues,
    num_positions: int,
    options: EngineOptions,
    head: HeadOptions,
    images: PassImages | None,
) -> tuple[dict[str, torch.Tensor], RouterSums | None]:
    """One chunk through the layers and the head.

    Returns:
        What it makes of the P predictor rows, nothing if there are none; and the sums of its expert layers' routers,
        where the options ask for the load-balancing loss.
    """
    routers = None
    if options.router_aux_loss_coef is not None:
        routers = RouterTally(model, [row_counts(chunk.occurrences, chunk.targets.device)])
    checkpoints = torch.is_grad_enabled() and checkpoints_pass(options.checkpoint, is_prefix=chunk.writes is not None)
    with without_cast_cache(chunk.targets.device), key_values.saving(), checkpointed(model, checkpoints):
        embeds = embed(model.get_input_embeddings(), chunk.item.input_ids, chunk.unique_ids, chunk.inverse)
        hidden = run_level_pass(
            model,
            chunk.item,
            embeds,
            key_values,
            num_positions=num_positions,
            backend=options.backend,
            keep=chunk.writes is not None,
            extras=PassExtras(routers, images),
        )
        sums = None if routers is None else routers.sums()
        rows = hidden.flatten(0, 1).index_select(0, chunk.item.predictor_rows)
        if not rows.shape[0]:
            return {}, sums
        with region("lm head"):
            return head_outputs(model, rows, chunk.targets, head, in_place=True), sums


def _num_before_last(chunks: Sequence[ChunkPlan], max_tokens: int | None) -> int:
    """How many chunks come before the last ones that together have at most `max_tokens` tokens."""
    total = 0
    for index in reversed(range(len(chunks))):
        total += chunks[index].num_tokens
        if max_tokens is not None and total > max_tokens:
            return index + 1
    return 0
