"""What a backend offers: forward and backward of one varlen attention block.

Shape legend: T queries, P keys, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from kvpref.ops.attention.block import AttentionParams, VarlenBlock
from kvpref.ops.attention.splitting import CallLimits


class Backend(ABC):
    """Kernels for one varlen block; stateless."""

    name: ClassVar[str]
    cost: ClassVar[str | None] = None
    """What a user pays for in this backend and not in others, if anything; `kvpref doctor` says it."""

    def provider(self) -> str:
        """Whose kernels these are, with the version."""
        return f"torch {torch.__version__}"

    @abstractmethod
    def unsupported_reason(self, query: torch.Tensor) -> str | None:
        """Why a query like this (device, dtype, head dim) cannot be served, or None when it can."""

    def call_limits(self, query: torch.Tensor) -> CallLimits | None:
        """What one launch over many pairs costs for a query (T, H, D); None where it is never worth splitting."""
        return None

    @abstractmethod
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of every pair of the block.

        Args:
            q: (T, H, D).
            k: (P, G, D).
            v: (P, G, D).
            block: The pairs.
            params: Scale.

        Returns:
            out (T, H, D) in the kernel's dtype (at least that of q), and lse (H, T): natural log, fp32 or wider. A
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
            dout: (T, H, D) gradient of the merged output.
            out: (T, H, D) merged output.
            lse: (H, T) merged log-sum-exp.

        Returns:
            dq (T, H, D), dk and dv (P, G, D), in the kernel's dtype (at least that of q).
        """
