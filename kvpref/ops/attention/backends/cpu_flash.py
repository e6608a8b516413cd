"""`cpu_flash`: PyTorch's own flash attention for CPU; one kernel call per pair, or per bucket of short ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from kvpref.ops.attention.backends.interface import Abilities, Backend, Needs
from kvpref.ops.attention.block import AttentionParams, Pair, VarlenBlock
from kvpref.prefix.blocks import Shape

# Up to this length calls cost more than arithmetic; beyond it, padding and copies cost more than calls.
_MAX_BUCKETED_TOKENS = 20
_MIN_BUCKET_SEGMENTS = 8
# Longest over shortest segment of a bucket; the shortest segments all share one.
_MAX_STRETCH = 1.5
_ALWAYS_TOGETHER_TOKENS = 8


class CpuFlash(Backend):
    """Native GQA, fp64 and fp32; 16-bit inputs are computed in fp32.

    The kernel accumulates dK and dV in the input's dtype, which would lose the sum over many responses in bf16, so
    16-bit inputs are widened first. An anti-causal square is a causal one with both orders reversed, so its rows are
    copied in reversed order.
    """

    name = "cpu_flash"
    can = Abilities(anti_causal=True, key_ranges=True)

    def refusal(self, query: torch.Tensor, needs: Needs) -> str | None:
        if query.device.type != "cpu":
            return f"it runs on CPU tensors only, got device {query.device.type!r}"
        return None if query.is_floating_point() else f"it needs a float dtype, got {query.dtype}"

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = _widen(q), _widen(k), _widen(v)
        out = torch.zeros_like(q)
        lse = q.new_full((q.shape[0], q.shape[1]), float("-inf"))
        is_causal = block.shape != "rectangle"
        for queries, keys in _calls(block.pairs, block.shape):
            call_out, call_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries.take(q), keys.take(k), keys.take(v), 0.0, is_causal, scale=params.scale
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
        is_causal = block.shape != "rectangle"
        overlap = block.starts_key is not None
        for queries, keys in _calls(block.pairs, block.shape):
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                queries.take_gradient(dout),
                queries.take(q),
                keys.take(k),
                keys.take(v),
                queries.take(out),
                queries.take(lse.T),
                0.0,
                is_causal,
                scale=params.scale,
            )
            # Queries are in at most one pair, and so are keys unless they come as ranges: write, do not add.
            queries.put(dq, grads[0])
            for whole, part in ((dk, grads[1]), (dv, grads[2])):
                if overlap:
                    keys.add(whole, part)
                else:
                    keys.put(whole, part)
        return dq, dk, dv


class _Run(NamedTuple):
    """Contiguous rows. Shapes: all rows (T, H, ...), call (1, H, L, ...)."""

    start: int
    end: int
    is_reversed: bool = False

    def length(self) -> int:
        return self.end - self.start

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """These rows in the kernel's layout; a view unless they are reversed."""
        own = rows[self.start : self.end]
        return (own.flip(0) if self.is_reversed else own).transpose(0, 1).unsqueeze(0)

    def take_gradient(self, rows: torch.Tensor) -> torch.Tensor:
        """The same for the output's gradient."""
        return self.take(rows)

    def put(self, rows: torch.Tensor, part: torch.Tensor) -> None:
        """Write what the kernel computed for these rows."""
        rows[self.start : self.end] = self._in_order(part)

    def add(self, rows: torch.Tensor, part: torch.Tensor) -> None:
        """Like `put`, but add."""
        rows[self.start : self.end] += self._in_order(part)

    def _in_order(self, part: torch.Tensor) -> torch.Tensor:
        own = part[0].transpose(0, 1)
        return own.flip(0) if self.is_reversed else own


class _Bucket(NamedTuple):
    """Segments of similar length, padded at their ends to L rows. Shapes: all rows (T, H, ...), call (B, H, L, ...).

    Under a causal mask only padding sees padding, so no mask is needed: the kernel's output there is dropped, and the
    gradient there is zero. Padding repeats the segment's last row, which keeps every number finite.
    """

    places: torch.Tensor  # (B, L) int64
    is_padding: torch.Tensor  # (B, L) bool
    own: torch.Tensor  # (R,) int64, the places of real rows in the flattened (B * L)

    @classmethod
    def of(cls, runs: list[_Run]) -> _Bucket:
        lengths = torch.tensor([run.length() for run in runs]).unsqueeze(1)
        offsets = torch.arange(int(lengths.max())).expand(len(runs), -1)
        is_padding = offsets >= lengths
        offsets = torch.minimum(offsets, lengths - 1)
        starts = torch.tensor([run.start for run in runs]).unsqueeze(1)
        ends = torch.tensor([run.end for run in runs]).unsqueeze(1)
        places = ends - 1 - offsets if runs[0].is_reversed else starts + offsets
        return cls(places, is_padding, (~is_padding).flatten().nonzero().squeeze(1))

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """These rows in the kernel's layout; a copy."""
        return rows[self.places].transpose(1, 2)

    def take_gradient(self, rows: torch.Tensor) -> torch.Tensor:
        """The same for the output's gradient, which is zero at padding."""
        taken = rows[self.places]
        taken[self.is_padding] = 0
        return taken.transpose(1, 2)

    def put(self, rows: torch.Tensor, part: torch.Tensor) -> None:
        """Write what the kernel computed for these rows."""
        rows[self.places.flatten()[self.own]] = part.transpose(1, 2).flatten(0, 1)[self.own]

    def add(self, rows: torch.Tensor, part: torch.Tensor) -> None:
        """Like `put`, but add; rows may be in several segments."""
        rows.index_add_(0, self.places.flatten()[self.own], part.transpose(1, 2).flatten(0, 1)[self.own])


_Rows = _Run | _Bucket


class _Square(NamedTuple):
    """A pair under a causal mask: as many queries as keys."""

    queries: _Run
    keys: _Run

    def length(self) -> int:
        return self.queries.length()


@lru_cache(maxsize=64)  # every layer of a pass needs the same few blocks
def _calls(pairs: tuple[Pair, ...], shape: Shape) -> tuple[tuple[_Rows, _Rows], ...]:
    """The query rows and key rows of each kernel call."""
    if shape == "rectangle":  # padded keys would be seen
        return tuple((_Run(q0, q1), _Run(k0, k1)) for q0, q1, k0, k1 in pairs)
    backwards = shape == "anti_causal"
    squares = [_Square(_Run(q0, q1, backwards), _Run(k0, k1, backwards)) for q0, q1, k0, k1 in pairs]
    return tuple(_in_buckets(squares))


def _in_buckets(squares: list[_Square]) -> Iterator[tuple[_Rows, _Rows]]:
    """Short squares of similar length together if there are enough of them, others alone."""
    bucket: list[_Square] = []
    for square in sorted(squares, key=_Square.length):
        if bucket and square.length() > max(_ALWAYS_TOGETHER_TOKENS, _MAX_STRETCH * bucket[0].length()):
            yield from _close(bucket)
            bucket = []
        if square.length() > _MAX_BUCKETED_TOKENS:
            yield square.queries, square.keys
        else:
            bucket.append(square)
    yield from _close(bucket)


def _close(squares: list[_Square]) -> Iterator[tuple[_Rows, _Rows]]:
    if len(squares) < _MIN_BUCKET_SEGMENTS:
        yield from ((square.queries, square.keys) for square in squares)
        return
    queries = _Bucket.of([square.queries for square in squares])
    is_self = all(square.queries == square.keys for square in squares)
    yield queries, queries if is_self else _Bucket.of([square.keys for square in squares])


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
