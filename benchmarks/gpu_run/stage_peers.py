"""FlexAttention with one row per batch beside the cascade, and TRL's trainer where it is installed."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from attention import AttentionLayer
from llama_models import DRY_RUN, LAYERS_OF_8B, LlamaSizes
from one_row import PROMPT, OneRow
from options import SweepOptions
from torch.nn.attention.flex_attention import flex_attention
from workloads import Shape, make_groups

from gpu_run.rows import Figure, Finding, Rows, judged, measured, skipped
from kvpref import Batch, collate
from kvpref.ops.attention import cascade_attention
from kvpref.profiling.timing import TimingOptions, time_rounds

TRL_MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}


def rows(options: SweepOptions) -> Rows:
    """One row per peer."""
    return {"flex_attention, one row": partial(_flex_row, options), "trl.DPOTrainer": partial(_trl_row, options)}


def _flex_row(options: SweepOptions) -> Finding:
    """Attention alone over the same queries, keys and values, forward and backward."""
    shape = Shape(prompt=2048, response=512, responses=2, groups=4)
    if options.dry_run:
        shape = Shape(prompt=24, response=6, responses=2, groups=2)
    sizes = DRY_RUN if options.dry_run else LAYERS_OF_8B
    batch = collate(make_groups(shape, sizes.vocab_size), device=options.device)
    flex = FlexRow(batch, sizes, options)
    layer = flex.same_for_the_cascade()
    difference = _relative(flex.forward()[flex.row.part != PROMPT], _responses(layer))
    cases = {"cascade": layer.run, "flex_attention": flex.run}
    for case in cases.values():
        case()  # warm-up
    rounds = TimingOptions(num_rounds=2 if options.dry_run else 9, num_warmup=0 if options.dry_run else 2)
    times = {name: min(values) for name, values in time_rounds(cases, options.device, rounds).items()}
    allowed = 1e-5 if options.dtype == torch.float32 else 4 * torch.finfo(options.dtype).eps
    return judged(
        met=difference <= allowed,
        bar=f"the same output to {allowed:.1g}",
        figures={
            "difference": Figure(difference, ""),
            "time": Figure(times["cascade"], "ms"),
            "time (flex_attention)": Figure(times["flex_attention"], "ms"),
            "speed-up": Figure(times["flex_attention"] / times["cascade"], "x"),
        },
        reason=None if flex.has_backward else "flex_attention has no backward on a CPU: its time is the forward's",
    )


class FlexRow:
    """One layer of attention over a batch in one row.

    Args:
        batch: Pairs, their responses different from the first token on.
        sizes: Heads.
        options: Device and dtype.
    """

    def __init__(self, batch: Batch, sizes: LlamaSizes, options: SweepOptions) -> None:
        self.batch, self.sizes, self.options = batch, sizes, options
        self.has_backward = options.device.type == "cuda"
        self.row = OneRow(list(batch.groups), str(options.device))
        self.mask = self.row.block_mask()
        self._flex = torch.compile(flex_attention) if self.has_backward else flex_attention
        generator = torch.Generator(options.device).manual_seed(0)

        def random(num_heads: int) -> torch.Tensor:
            shape = (self.row.input_ids.numel(), num_heads, sizes.head_dim)
            return torch.randn(shape, generator=generator, device=options.device, dtype=options.dtype)

        self.query, self.grad = (random(sizes.num_heads) for _ in range(2))
        self.key, self.value = (random(sizes.num_kv_heads) for _ in range(2))
        if self.has_backward:
            self.query, self.key, self.value = (t.requires_grad_() for t in (self.query, self.key, self.value))

    def forward(self) -> torch.Tensor:
        """(T, H, D)."""
        query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (self.query, self.key, self.value))
        scale, is_gqa = self.sizes.head_dim**-0.5, key.shape[1] != query.shape[1]
        out: torch.Tensor = self._flex(query, key, value, block_mask=self.mask, scale=scale, enable_gqa=is_gqa)
        return out[0].transpose(0, 1)

    def run(self) -> None:
        """Forward, and backward where there is one."""
        out = self.forward()
        if self.has_backward:
            out.backward(self.grad)
            self.query.grad = self.key.grad = self.value.grad = None

    def same_for_the_cascade(self) -> AttentionLayer:
        """Prompts in the first pass, responses in the second, with the row's numbers."""
        layer = AttentionLayer(self.batch.plan("two_pass"), self.sizes, self.options)
        prompts = self.row.part == PROMPT
        for item, here in zip(layer.passes, (prompts, ~prompts), strict=True):
            item.query, item.key, item.value = (
                tensor.detach()[here].requires_grad_() for tensor in (self.query, self.key, self.value)
            )
            item.grad = self.grad[here]
        return layer


def _responses(layer: AttentionLayer) -> torch.Tensor:
    prompts, responses = layer.passes
    prefixes = [(prompts.key, prompts.value)]
    return cascade_attention(responses.query, responses.key, responses.value, prefixes, responses.plan)


def _relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.detach().double() - truth.detach().double()).norm() / truth.detach().double().norm())


def _trl_row(options: SweepOptions) -> Finding:
    for package in ("trl", "datasets", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            return skipped(f"{package} is not installed")
    from peers.comparison import compare
    from peers.made_up import made_up_task
    from peers.trl_dpo import TrlPeer

    real = {} if options.dry_run else {"longer": 20, "model_settings": TRL_MODEL}
    steps, pairs = (2, 2) if options.dry_run else (4, 4)
    peer = TrlPeer("best")
    with tempfile.TemporaryDirectory(prefix="kvpref-peers-") as folder:
        task = made_up_task(Path(folder), device=options.device.type, **real)
        task = task.in_batches(peer.batching, num_steps=steps, pairs_per_step=pairs)
        found = compare(peer, task, num_rounds=1, progress=lambda line: print(line, file=sys.stderr))
    if found.timing is None:
        return skipped(f"{found.verdict}: {found.reason}")
    return measured(
        {
            "speed-up": Figure(found.timing.speedup, "x"),
            "ideal": Figure(found.timing.ideal, "x"),
            "efficiency": Figure(found.timing.speedup / found.timing.ideal, ""),
        },
        reason="float32, a small model of made-up words",
    )
