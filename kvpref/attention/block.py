"""What a backend is told about one varlen attention block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from kvpref.layout import VarlenLayout

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
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    num_queries: int
    num_keys: int
    causal: bool

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The non-empty pairs as (q_start, q_end, k_start, k_end). Reads the offsets, so on CUDA it synchronises."""
        return _non_empty_pairs(tuple(self.cu_seqlens_q.tolist()), tuple(self.cu_seqlens_k.tolist()))

    @property
    def num_attended_pairs(self) -> int:
        """Query-key pairs that attend to each other, per head. Reads the offsets, so on CUDA it synchronises."""
        if self.causal:
            return sum((q1 - q0) * (q1 - q0 + 1) // 2 for q0, q1, _, _ in self.pairs)
        return sum((q1 - q0) * (k1 - k0) for q0, q1, k0, k1 in self.pairs)

    @classmethod
    def from_layout(cls, layout: VarlenLayout, device: torch.device | str = "cpu") -> VarlenBlock:
        spans_q, spans_k = tuple(pairwise(layout.cu_seqlens_q)), tuple(pairwise(layout.cu_seqlens_k))
        return cls(
            cu_seqlens_q=torch.tensor(layout.cu_seqlens_q, dtype=torch.int32, device=device),
            cu_seqlens_k=torch.tensor(layout.cu_seqlens_k, dtype=torch.int32, device=device),
            max_seqlen_q=max(end - start for start, end in spans_q),
            max_seqlen_k=max(end - start for start, end in spans_k),
            num_queries=layout.cu_seqlens_q[-1],
            num_keys=layout.cu_seqlens_k[-1],
            causal=layout.causal,
        )


@lru_cache(maxsize=64)  # every layer of a pass asks for the same few blocks
def _non_empty_pairs(cu_seqlens_q: tuple[int, ...], cu_seqlens_k: tuple[int, ...]) -> tuple[Pair, ...]:
    # A zero-length query or key range kills the process inside PyTorch's CPU flash kernel.
    spans = zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True)
    return tuple((*q, *k) for q, k in spans if q[1] > q[0] and k[1] > k[0])
