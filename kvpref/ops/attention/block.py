"""One varlen attention block as a backend receives it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from operator import sub
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from kvpref.prefix.blocks import Shape, VarlenLayout
from kvpref.records.host_copies import to_device
from kvpref.records.tensor_fields import STAYS_ON_THE_HOST

Pair = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class AttentionParams:
    """The numbers of a layer's attention that do not depend on the batch.

    Attributes:
        scale: Factor on the dot products, before the softmax.
        softcap: Scaled scores s become ``softcap * tanh(s / softcap)``; None leaves scores unchanged.
    """

    scale: float
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class BlockKind:
    """A block's properties other than its offsets; see `VarlenBlock`."""

    shape: Shape
    source: int = 0
    window: int | None = None

    def flat(self) -> tuple[int, int, int]:
        """The fields as integers, which operators take."""
        return _SHAPES.index(self.shape), self.source, self.window or 0

    @classmethod
    def from_flat(cls, shape: int, source: int, window: int) -> BlockKind:
        """The inverse of `flat`."""
        return cls(shape=_SHAPES[shape], source=source, window=window or None)


_SHAPES: tuple[Shape, ...] = get_args(Shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class VarlenBlock:
    """Pairs of contiguous query and key ranges; the queries of a pair attend to its keys.

    Attributes:
        cu_seqlens_q: (num_pairs + 1,) int32 row offsets of the queries, on the device. Pairs may have no queries.
        cu_seqlens_k: (num_pairs + 1,) int32 row offsets of the keys, on the device.
        max_seqlen_q: Longest query range, in tokens.
        max_seqlen_k: Longest key range, in tokens.
        num_queries: Query rows over all pairs.
        num_keys: Key and value rows over all pairs.
        num_source_rows: Rows of the source; with `starts_key`, a lower bound.
        shape: What a query sees of its pair's keys; see `VarlenLayout`, also for the next two.
        source: Where the keys are: 0 for the pass's own rows, i for those of prefix i - 1.
        window: In a causal block whose queries are its keys, query q sees key k only where q - k < window.
        offsets_key: Both offsets on the host, as a cache key for whatever is computed from them once for all layers
            without waiting for the device; see `read_offsets`.
        starts_key: First row of each pair's keys in the source, int32; None if that is their offset.
        host_offsets: (2, num_pairs + 1) int32, the offsets as a tensor in host memory, which operators take. With
            `starts_key`, one more row holds the first rows of keys, followed by a 0. None for a block that is passed to
            no operator.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    num_queries: int
    num_keys: int
    num_source_rows: int
    shape: Shape
    offsets_key: bytes = field(repr=False)
    source: int = 0
    window: int | None = None
    starts_key: bytes | None = field(default=None, repr=False)
    host_offsets: torch.Tensor | None = field(default=None, metadata=STAYS_ON_THE_HOST)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The non-empty pairs as (q_start, q_end, k_start, k_end), rows of the source."""
        return _non_empty_pairs(self.offsets_key, self.starts_key)

    @property
    def kind(self) -> BlockKind:
        """The block's properties other than its offsets."""
        return BlockKind(shape=self.shape, source=self.source, window=self.window)

    @property
    def every_pair_meets(self) -> bool:
        """Whether no pair lacks queries or keys."""
        return len(self.pairs) == len(self.offsets_key) // 8 - 1

    @property
    def num_attended_pairs(self) -> int:
        """Query-key pairs that attend to each other, per head."""
        if self.shape == "rectangle":
            return sum((q1 - q0) * (k1 - k0) for q0, q1, k0, k1 in self.pairs)
        return sum(_pairs_of_square(q1 - q0, self.window) for q0, q1, _, _ in self.pairs)

    @property
    def causal(self) -> bool:
        """Whether query i of a pair sees its keys up to and including i."""
        return self.shape == "causal"

    @classmethod
    def from_layout(cls, layout: VarlenLayout, device: torch.device | str = "cpu") -> VarlenBlock:
        rows = [layout.cu_seqlens_q, layout.cu_seqlens_k]
        if layout.key_starts is not None:
            rows.append((*layout.key_starts, 0))
        offsets = np.array(rows, dtype=np.int32)
        # Not views: code would be compiled again whenever a row's storage offset changes.
        cu_seqlens = [to_device(torch.from_numpy(row.copy()), torch.device(device)) for row in offsets[:2]]
        kind = BlockKind(shape=layout.shape, source=layout.source, window=layout.window)
        host_offsets = torch.from_numpy(offsets)
        block = cls.from_host(host_offsets, cu_seqlens, kind)
        object.__setattr__(block, "host_offsets", host_offsets)  # before anyone else sees the block
        return block

    @classmethod
    def from_host(cls, host_offsets: torch.Tensor, cu_seqlens: Iterable[torch.Tensor], kind: BlockKind) -> VarlenBlock:
        """The block with `host_offsets`, and the same query and key offsets on the device."""
        offsets = host_offsets.numpy()
        starts_key = offsets[2, :-1].tobytes() if len(offsets) == 3 else None
        return cls.from_offsets(offsets[:2].tobytes(), cu_seqlens, kind, starts_key)

    @classmethod
    def from_offsets(
        cls, offsets_key: bytes, cu_seqlens: Iterable[torch.Tensor], kind: BlockKind, starts_key: bytes | None = None
    ) -> VarlenBlock:
        """The block with the given query and key offsets, on the host and as tensors on the device."""
        cu_seqlens_q, cu_seqlens_k = cu_seqlens
        (longest_q, num_queries), (longest_k, num_keys) = _longest_and_total(offsets_key)
        return cls(
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
            num_queries=num_queries,
            num_keys=num_keys,
            num_source_rows=num_keys if starts_key is None else _last_row(offsets_key, starts_key),
            shape=kind.shape,
            source=kind.source,
            window=kind.window,
            offsets_key=offsets_key,
            starts_key=starts_key,
        )


def read_offsets(offsets_key: bytes) -> NDArray[np.int32]:
    """(2, num_pairs + 1) offsets of queries and keys, from `VarlenBlock.offsets_key`."""
    return np.frombuffer(offsets_key, dtype=np.int32).reshape(2, -1)


# Every layer of a pass needs the same few blocks.
@lru_cache(maxsize=256)
def _longest_and_total(offsets_key: bytes) -> list[tuple[int, int]]:
    """For queries and for keys: the longest range, and the number of rows."""
    # Mostly a few pairs, for which numpy takes longer.
    rows = read_offsets(offsets_key).tolist()
    return [(max(map(sub, own[1:], own)), own[-1]) for own in rows]


def _last_row(offsets_key: bytes, starts_key: bytes) -> int:
    """One past the last row of the source that a query sees."""
    return max((pair[3] for pair in _non_empty_pairs(offsets_key, starts_key)), default=0)


@lru_cache(maxsize=64)
def _non_empty_pairs(offsets_key: bytes, starts_key: bytes | None) -> tuple[Pair, ...]:
    offsets_q, offsets_k = read_offsets(offsets_key).tolist()
    starts = offsets_k[:-1] if starts_key is None else np.frombuffer(starts_key, dtype=np.int32).tolist()
    spans = zip(pairwise(offsets_q), pairwise(offsets_k), starts, strict=True)
    # A zero-length query or key range kills the process inside PyTorch's CPU flash kernel.
    return tuple((*q, first, first + k[1] - k[0]) for q, k, first in spans if q[1] > q[0] and k[1] > k[0])


def _pairs_of_square(length: int, window: int | None) -> int:
    """Query-key pairs of a causal or anti-causal square, inside a window."""
    outside = 0 if window is None else max(0, length - window)
    return length * (length + 1) // 2 - outside * (outside + 1) // 2
