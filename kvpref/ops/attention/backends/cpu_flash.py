"""`cpu_flash`: PyTorch's own flash attention for CPU; one kernel call per pair, or per bucket of short ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from kvpref.ops.attention.backends.interface import Backend
from kvpref.ops.attention.block import AttentionParams, Pair, VarlenBlock

# Up to here calls cost more than arithmetic; beyond, the kernel is busy and padding and copies cost more than calls.
_MAX_BUCKETED_TOKENS = 20
_MIN_BUCKET_SEGMENTS = 8
# The longest segment of a bucket over its shortest; the shortest ones all go together.
_MAX_STRETCH = 1.5
_ALWAYS_TOGETHER_TOKENS = 8


class CpuFlash(Backend):
    """Native GQA, fp64 and fp32; 16-bit inputs are computed in fp32.

    The kernel accumulates dK and dV in the input's dtype, which would lose the sum over many responses in bf16, so
    16-bit inputs are widened first.
    """

    name = "cpu_flash"

    def unsupported_reason(self, query: torch.Tensor) -> str | None:
        if query.device.type != "cpu":
            return f"it runs on CPU tensors only, got device {query.device.type!r}"
        return None if query.is_floating_point() else f"it needs a float dtype, got {query.dtype}"

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = _widen(q), _widen(k), _widen(v)
        out = torch.zeros_like(q)
        lse = q.new_full((q.shape[0], q.shape[1]), float("-inf"))
        for queries, keys in _calls(block.pairs, block.causal):
            call_out, call_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries.take(q), keys.take(k), keys.take(v), 0.0, block.causal, scale=params.scale
            )
            queries.put(out, call_out)
            queries.put(lse, call_lse)
        return out, lse.T

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        block: VarlenBlock,
        params: AttentionParams,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, out, dout = _widen(q), _widen(k), _widen(v), _widen(out), _widen(dout)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys in _calls(block.pairs, block.causal):
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                queries.take_gradient(dout),
                queries.take(q),
                keys.take(k),
                keys.take(v),
                queries.take(out),
                queries.take(lse.T),
                0.0,
                block.causal,
                scale=params.scale,
            )
            # Every row of a block belongs to at most one pair, so the shares are written, not added.
            queries.put(dq, grads[0])
            keys.put(dk, grads[1])
            keys.put(dv, grads[2])
        return dq, dk, dv


class _Run(NamedTuple):
    """Contiguous rows. Shapes: all rows (T, H, ...), call (1, H, L, ...)."""

    start: int
    end: int

    def length(self) -> int:
        """Rows."""
        return self.end - self.start

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """These rows as the kernel wants them; a view."""
        return rows[self.start : self.end].transpose(0, 1).unsqueeze(0)

    def take_gradient(self, rows: torch.Tensor) -> torch.Tensor:
        """The same for the output's gradient."""
        return self.take(rows)

    def put(self, rows: torch.Tensor, part: torch.Tensor) -> None:
        """Write what the kernel computed for these rows."""
        rows[self.start : self.end] = part[0].transpose(0, 1)


class _Bucket(NamedTuple):
    """Segments of like length, padded at their ends to L rows. Shapes: all rows (T, H, ...), call (B, H, L, ...).

    Under a causal mask only padding sees padding, so no mask is needed: what the kernel computes there is dropped, and
    a gradient of zero goes in. Padding repeats the segment's last row, which keeps every number finite.
    """

    places: torch.Tensor  # (B, L) int64
    is_padding: torch.Tensor  # (B, L) bool
    own: torch.Tensor  # (R,) int64, the places of real rows in the flattened (B * L)

    @classmethod
    def of(cls, runs: list[_Run]) -> _Bucket:
        length = max(map(_Run.length, runs))
        ends = torch.tensor([run.end for run in runs]).unsqueeze(1)
        places = torch.tensor([run.start for run in runs]).unsqueeze(1) + torch.arange(length)
        is_padding = places >= ends
        return cls(torch.minimum(places, ends - 1), is_padding, (~is_padding).flatten().nonzero().squeeze(1))

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """These rows as the kernel wants them; a copy."""
        return rows[self.places].transpose(1, 2)

    def take_gradient(self, rows: torch.Tensor) -> torch.Tensor:
        """The same for the output's gradient, which padding has none of."""
        taken = rows[self.places]
        taken[self.is_padding] = 0
        return taken.transpose(1, 2)

    def put(self, rows: torch.Tensor, part: torch.Tensor) -> None:
        """Write what the kernel computed for these rows."""
        rows[self.places.flatten()[self.own]] = part.transpose(1, 2).flatten(0, 1)[self.own]


_Rows = _Run | _Bucket


@lru_cache(maxsize=64)  # every layer of a pass asks for the same few blocks
def _calls(pairs: tuple[Pair, ...], causal: bool) -> tuple[tuple[_Rows, _Rows], ...]:
    """The rows of queries and of keys of each kernel call."""
    if not causal:  # padded keys would be seen
        return tuple((_Run(q0, q1), _Run(k0, k1)) for q0, q1, k0, k1 in pairs)
    runs = [_Run(q0, q1) for q0, q1, _, _ in pairs]
    return tuple((rows, rows) for rows in _in_buckets(runs))


def _in_buckets(runs: list[_Run]) -> Iterator[_Rows]:
    """Short runs of like length together where there are enough of them, others alone."""
    bucket: list[_Run] = []
    for run in sorted(runs, key=_Run.length):
        if bucket and run.length() > max(_ALWAYS_TOGETHER_TOKENS, _MAX_STRETCH * bucket[0].length()):
            yield from _close(bucket)
            bucket = []
        if run.length() > _MAX_BUCKETED_TOKENS:
            yield run
        else:
            bucket.append(run)
    yield from _close(bucket)


def _close(runs: list[_Run]) -> list[_Run] | list[_Bucket]:
    return runs if len(runs) < _MIN_BUCKET_SEGMENTS else [_Bucket.of(runs)]


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
