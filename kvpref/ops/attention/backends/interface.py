"""What a backend offers: forward and backward of one varlen attention block.

Shape legend: T queries, P keys, H heads, G key/value heads, D head dim of queries and keys, E that of values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvpref.ops.attention.block import AttentionParams, VarlenBlock
from kvpref.ops.attention.splitting import CallLimits


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What kernels do themselves; `kvpref.ops.attention.fitting` rewrites calls for kernels that lack an ability."""

    windows: bool = False
    """Windows of a causal block; without, it runs as squares and rectangles."""

    anti_causal: bool = False
    """Anti-causal squares; without, both orders are reversed."""

    key_ranges: bool = False
    """Key ranges that overlap or leave rows out; without, keys and values are gathered."""

    value_head_dims: bool = False
    """Values whose head dim differs from the keys'; without, the smaller of the two is padded with zeros."""

    softcap: bool = False
    """Scores go through ``cap * tanh(score / cap)``; without, a call that needs it is refused."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a call needs from a backend besides the query's device, dtype and head dim."""

    value_head_dim: int = 0
    """Head dim of the values; 0 if it is the query's."""

    softcap: bool = False
    """Whether scores are capped."""

    def head_dim(self, query: torch.Tensor) -> int:
        """The larger of both head dims: what kernels see that take only one."""
        return max(query.shape[-1], self.value_head_dim)


PLAIN = Needs()


class Backend(ABC):
    """Kernels for one varlen block; stateless."""

    name: ClassVar[str]
    can: ClassVar[Abilities] = Abilities()
    cost: ClassVar[str | None] = None
    """What this backend costs that others do not, if anything; shown by `kvpref doctor`."""

    def provider(self) -> str:
        """The package that ships these kernels, with its version."""
        return f"torch {torch.__version__}"

    def unsupported_reason(self, query: torch.Tensor, needs: Needs = PLAIN) -> str | None:
        """Why a query like this (device, dtype, head dim) cannot be served; None if it can."""
        if needs.softcap and not self.can.softcap:
            return "it has no softcap"
        return self.refusal(query, needs)

    @abstractmethod
    def refusal(self, query: torch.Tensor, needs: Needs) -> str | None:
        """Like `unsupported_reason`, for a call whose needs the backend's abilities cover."""

    def call_limits(self, query: torch.Tensor) -> CallLimits | None:
        """What one launch over many pairs costs for a query (T, H, D); None if splitting never pays."""
        return None

    @abstractmethod
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of every pair of the block.

        Args:
            q: (T, H, D).
            k: (P, G, D). With the ability `key_ranges`, all rows of the source.
            v: (P, G, E), where E is D without the ability `value_head_dims`.
            block: The pairs, in a form that the abilities cover.
            params: Scale and softcap.

        Returns:
            out (T, H, E) in the kernel's dtype (at least that of q), and lse (H, T): natural log, fp32 or wider. A
            row that belongs to no pair, or to one without keys, has out 0 and lse -inf or +inf.
        """

    @abstractmethod
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
        """This block's share of the gradients, given the *merged* out and lse of all blocks.

        Args:
            dout: (T, H, E) gradient of the merged output.
            out: (T, H, E) merged output.
            lse: (H, T) merged log-sum-exp.

        Returns:
            dq (T, H, D), dk (P, G, D) and dv (P, G, E), in the kernel's dtype (at least that of q).
        """
