"""One attention call with every kind of pair that kvpref makes, strided as in models, and dense attention over
the same inputs.

Shape legend: T rows of the pass, P rows of the prefixes, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from attention_errors import Errors, errors_beside_naive, plan_to
from dense_attention import Inputs
from options import SweepOptions

from kvpref.ops.attention import AttentionParams, CascadePlan, VarlenBlock, cascade_attention
from kvpref.prefix.blocks import VarlenLayout

SEGMENTS = (0, 1, 70, 200, 201, 202, 330, 337)
"""Row offsets of the segments of the pass: single tokens, and longer than a kernel's block."""
CHILDREN = (0, 200, 200, 201, 330, 337)
"""Row offsets of each prefix's descendants: none of the second, a single query of the third."""
PREFIXES = (0, 300, 337, 338, 467, 467)
"""Row offsets of the prefixes; the last descendants have none, so their rows see no key in this block."""
UNREAD = slice(300, 337)
"""Rows of the prefix without descendants: their gradients are zeros."""

Strided = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One setting of a kernel."""

    backend: str
    """Name of the backend."""

    packing: str
    """One of `PACKINGS`."""

    head_dim: int
    """Elements per head."""

    group: int
    """Query heads per key/value head."""

    dtype: torch.dtype
    """Of everything."""

    @property
    def name(self) -> str:
        """The row's name, such as ``cuda_flash phi3 128 x4 bfloat16``."""
        return f"{self.backend} {self.packing} {self.head_dim} x{self.group} {str(self.dtype).removeprefix('torch.')}"


def _one_projection(rows: int, case: KernelCase, generator: torch.Generator) -> Strided:
    """Phi-3: one projection, cut into queries, keys and values."""
    num_kv_heads = 2
    num_heads = num_kv_heads * case.group
    width = (num_heads + 2 * num_kv_heads) * case.head_dim
    fused = _normal(rows, width, case, generator).unflatten(1, (-1, case.head_dim))
    query, key, value = fused.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    return query, key, value


def _per_head(rows: int, case: KernelCase, generator: torch.Generator) -> Strided:
    """GPT-NeoX: query, key and value of a head side by side."""
    fused = _normal(rows, 4 * 3 * case.head_dim, case, generator).unflatten(1, (4, 3 * case.head_dim))
    query, key, value = fused.split(case.head_dim, dim=2)
    return query, key, value


def _normal(rows: int, width: int, case: KernelCase, generator: torch.Generator) -> torch.Tensor:
    # 1.5 makes some rows attend sharply and others broadly.
    noise = 1.5 * torch.randn(rows, width, generator=generator, device=generator.device)
    return noise.to(case.dtype)


PACKINGS: dict[str, Callable[[int, KernelCase, torch.Generator], Strided]] = {
    "phi3": _one_projection,
    "gpt_neox": _per_head,
}


def make_inputs(case: KernelCase, device: torch.device) -> Inputs:
    """Leaves with the strides of the packing."""
    generator = torch.Generator(device).manual_seed(case.head_dim + case.group)
    pack = PACKINGS[case.packing]
    query, key, value = (tensor.requires_grad_() for tensor in pack(SEGMENTS[-1], case, generator))
    _, prefix_key, prefix_value = pack(PREFIXES[-1], case, generator)
    return Inputs(query, key, value, [(prefix_key.requires_grad_(), prefix_value.requires_grad_())])


def make_plan(case: KernelCase, device: torch.device) -> CascadePlan:
    """Causal over the segments, and across to the prefixes."""
    own = VarlenLayout(cu_seqlens_q=SEGMENTS, cu_seqlens_k=SEGMENTS, shape="causal")
    across = VarlenLayout(cu_seqlens_q=CHILDREN, cu_seqlens_k=PREFIXES, shape="rectangle", source=1)
    plan = CascadePlan(
        blocks=(VarlenBlock.from_layout(own), VarlenBlock.from_layout(across)),
        params=AttentionParams(scale=case.head_dim**-0.5),
        backend=case.backend,
    )
    return plan_to(plan, str(device))


def visible() -> torch.Tensor:
    """(T, P + T) bool: which keys a row sees."""
    mask = torch.zeros(SEGMENTS[-1], PREFIXES[-1] + SEGMENTS[-1], dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(pairwise(CHILDREN), pairwise(PREFIXES), strict=True):
        mask[q0:q1, k0:k1] = True
    for start, end in pairwise(SEGMENTS):
        own = slice(PREFIXES[-1] + start, PREFIXES[-1] + end)
        mask[start:end, own] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    return mask


def naive(inputs: Inputs) -> torch.Tensor:
    """(T, H, D): softmax over a masked square, in the inputs' dtype throughout."""
    ratio = inputs.query.shape[1] // inputs.key.shape[1]
    ((prefix_key, prefix_value),) = inputs.prefixes
    key = torch.cat([prefix_key, inputs.key]).repeat_interleave(ratio, dim=1)
    value = torch.cat([prefix_value, inputs.value]).repeat_interleave(ratio, dim=1)
    scores = torch.einsum("qhd,khd->hqk", inputs.query, key) * inputs.query.shape[-1] ** -0.5
    hidden = ~visible().to(scores.device)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value)


def cascade(case: KernelCase, device: torch.device) -> Callable[[Inputs], torch.Tensor]:
    """kvpref's attention, which is judged."""
    plan = make_plan(case, device)

    def run(inputs: Inputs) -> torch.Tensor:
        return cascade_attention(inputs.query, inputs.key, inputs.value, inputs.prefixes, plan)

    return run


def errors_of(case: KernelCase, device: torch.device) -> list[Errors]:
    """Compare the output and every gradient with float64."""
    return errors_beside_naive(cascade(case, device), naive, make_inputs(case, device), str(device))


def gradients(case: KernelCase, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Forward and backward, nothing else: dq, dk, dv, and dk and dv of the prefixes."""
    inputs = make_inputs(case, device)
    out = cascade(case, device)(inputs)
    return torch.autograd.grad(out, inputs.leaves(), torch.ones_like(out))


def all_cases(backends: list[str], options: SweepOptions) -> Iterator[KernelCase]:
    """Every setting of every backend; the second 16-bit dtype in one setting only."""
    settings = [("phi3", group, dim, options.dtype) for dim in (64, 80, 96, 128, 256) for group in (1, 4, 8)]
    settings += [("gpt_neox", 1, dim, options.dtype) for dim in (64, 80, 96, 128, 256)]
    if options.dtype == torch.bfloat16:
        settings.append(("phi3", 4, 128, torch.float16))
    for backend in backends:
        for packing, group, head_dim, dtype in settings:
            yield KernelCase(backend=backend, packing=packing, head_dim=head_dim, group=group, dtype=dtype)
