"""`cpu_flash`: PyTorch's own flash attention for CPU, one kernel call per pair."""

from __future__ import annotations

import torch

from kvpref.attention.backends.interface import Backend
from kvpref.attention.block import AttentionParams, VarlenBlock


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
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"))
        for q0, q1, k0, k1 in block.pairs:
            pair_out, pair_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(q[q0:q1]),
                _heads_first(k[k0:k1]),
                _heads_first(v[k0:k1]),
                0.0,
                block.causal,
                scale=params.scale,
            )
            out[q0:q1] = pair_out[0].transpose(0, 1)
            lse[:, q0:q1] = pair_lse[0]
        return out, lse

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
        for q0, q1, k0, k1 in block.pairs:
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(dout[q0:q1]),
                _heads_first(q[q0:q1]),
                _heads_first(k[k0:k1]),
                _heads_first(v[k0:k1]),
                _heads_first(out[q0:q1]),
                lse[:, q0:q1].unsqueeze(0),
                0.0,
                block.causal,
                scale=params.scale,
            )
            # Every row of a block belongs to at most one pair, so the shares are written, not added.
            for total, rows, grad in (
                (dq, slice(q0, q1), grads[0]),
                (dk, slice(k0, k1), grads[1]),
                (dv, slice(k0, k1), grads[2]),
            ):
                total[rows] = grad[0].transpose(0, 1)
        return dq, dk, dv


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _heads_first(rows: torch.Tensor) -> torch.Tensor:
    """(T, H, D) -> (1, H, T, D), a view."""
    return rows.transpose(0, 1).unsqueeze(0)
