"""What a backend is told about one varlen attention block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from kvpref.prefix.levels import VarlenLayout
from kvpref.records.host_copies import to_device
from kvpref.records.tensor_fields import STAYS_ON_THE_HOST

Pair = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class AttentionParams:
    """The numbers of a layer's attention that do not depend on the batch.

    Attributes:
        scale: Factor on the dot products, before the softmax.
    """

    scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class VarlenBlock:
    """Pairs of contiguous query and key ranges; the queries of a pair attend to its keys.

    Attributes:
        cu_seqlens_q: (num_pairs + 1,) int32 row offsets of the queries, on the device. Pairs may have no queries.
        cu_seqlens_k: (num_pairs + 1,) int32 row offsets of the keys, on the device.
        max_seqlen_q: Longest query range, in tokens.
        max_seqlen_k: Longest key range, in tokens.
        num_queries: Rows of the query, over all pairs.
        num_keys: Rows of keys and values, over all pairs.
        causal: Query j of a pair sees its keys up to and including j; both ranges are then equal.
        offsets_key: Both offsets on the host, as one key for what is computed from them once for all layers, without
            waiting for the device; see `read_offsets`.
        host_offsets: (2, num_pairs + 1) int32, the same as a tensor, which stays in host memory: what operators take.
            None for a block that no operator is given.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    num_queries: int
    num_keys: int
    causal: bool
    offsets_key: bytes = field(repr=False)
    host_offsets: torch.Tensor | None = field(default=None, metadata=STAYS_ON_THE_HOST)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The non-empty pairs as (q_start, q_end, k_start, k_end)."""
        return _non_empty_pairs(self.offsets_key)

    @property
    def num_attended_pairs(self) -> int:
        """Query-key pairs that attend to each other, per head."""
        if self.causal:
            return sum((q1 - q0) * (q1 - q0 + 1) // 2 for q0, q1, _, _ in self.pairs)
        return sum((q1 - q0) * (k1 - k0) for q0, q1, k0, k1 in self.pairs)

    @classmethod
    def from_layout(cls, layout: VarlenLayout, device: torch.device | str = "cpu") -> VarlenBlock:
        host_offsets = torch.tensor([layout.cu_seqlens_q, layout.cu_seqlens_k], dtype=torch.int32)
        block = cls.from_offsets(
            host_offsets.numpy().tobytes(), to_device(host_offsets, torch.device(device)), causal=layout.causal
        )
        return replace(block, host_offsets=host_offsets)

    @classmethod
    def from_offsets(cls, offsets_key: bytes, cu_seqlens: Iterable[torch.Tensor], *, causal: bool) -> VarlenBlock:
        """The block of some offsets: of queries and keys on the host, and both as tensors on the device."""
        cu_seqlens_q, cu_seqlens_k = cu_seqlens
        (longest_q, num_queries), (longest_k, num_keys) = _longest_and_total(offsets_key)
        return cls(
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
            num_queries=num_queries,
            num_keys=num_keys,
            causal=causal,
            offsets_key=offsets_key,
        )


def read_offsets(offsets_key: bytes) -> NDArray[np.int32]:
    """(2, num_pairs + 1) offsets of queries and keys, from `VarlenBlock.offsets_key`."""
    return np.frombuffer(offsets_key, dtype=np.int32).reshape(2, -1)


# Every layer of a pass asks for the same few blocks.
@lru_cache(maxsize=256)
def _longest_and_total(offsets_key: bytes) -> list[tuple[int, int]]:
    """Of queries and keys: the longest range, and all rows."""
    return [(int(np.diff(row).max()), int(row[-1])) for row in read_offsets(offsets_key)]


@lru_cache(maxsize=64)
def _non_empty_pairs(offsets_key: bytes) -> tuple[Pair, ...]:
    offsets_q, offsets_k = read_offsets(offsets_key).tolist()
    # A zero-length query or key range kills the process inside PyTorch's CPU flash kernel.
    spans = zip(pairwise(offsets_q), pairwise(offsets_k), strict=True)
    return tuple((*q, *k) for q, k in spans if q[1] > q[0] and k[1] > k[0])
