"""`reference`: dense masked softmax, the oracle of every test. Any device, any float dtype."""

from __future__ import annotations

import torch

from kvpref.ops.attention.backends.interface import Backend
from kvpref.ops.attention.block import AttentionParams, VarlenBlock


class Reference(Backend):
    """Materialises (G, H/G, Tq, Tk) scores per pair; computes in fp32, or fp64 for fp64 inputs."""

    name = "reference"

    def unsupported_reason(self, query: torch.Tensor) -> str | None:
        return None if query.is_floating_point() else f"needs a float dtype, got {query.dtype}"

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = _upcast(q), _upcast(k), _upcast(v)
        out = torch.zeros_like(q)
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"))
        for q0, q1, k0, k1 in block.pairs:
            scores = _scores(q[q0:q1], k[k0:k1], block.causal, params.scale)
            pair_lse = torch.logsumexp(scores, dim=-1)
            probs = torch.exp(scores - pair_lse.unsqueeze(-1))
            out[q0:q1] = _merge_heads(torch.einsum("ghij,jgd->ghid", probs, v[k0:k1]))
            lse[:, q0:q1] = pair_lse.flatten(0, 1)
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
        q, k, v, out, dout = _upcast(q), _upcast(k), _upcast(v), _upcast(out), _upcast(dout)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        num_kv_heads = k.shape[1]
        delta = (dout * out).sum(-1).T  # (H, T)
        for q0, q1, k0, k1 in block.pairs:
            scores = _scores(q[q0:q1], k[k0:k1], block.causal, params.scale)
            probs = torch.exp(scores - lse[:, q0:q1].unflatten(0, (num_kv_heads, -1)).unsqueeze(-1))
            dout_heads = _split_heads(dout[q0:q1], num_kv_heads)
            dprobs = torch.einsum("ghid,jgd->ghij", dout_heads, v[k0:k1])
            dscores = probs * (dprobs - delta[:, q0:q1].unflatten(0, (num_kv_heads, -1)).unsqueeze(-1)) * params.scale
            dq[q0:q1] += _merge_heads(torch.einsum("ghij,jgd->ghid", dscores, k[k0:k1]))
            dk[k0:k1] += torch.einsum("ghij,ghid->jgd", dscores, _split_heads(q[q0:q1], num_kv_heads))
            dv[k0:k1] += torch.einsum("ghij,ghid->jgd", probs, dout_heads)
        return dq, dk, dv


def _upcast(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _split_heads(tensor: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """(T, H, D) -> (G, H/G, T, D)."""
    return tensor.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _merge_heads(tensor: torch.Tensor) -> torch.Tensor:
    """(G, H/G, T, D) -> (T, H, D)."""
    return tensor.permute(2, 0, 1, 3).flatten(1, 2)


def _scores(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    scores = torch.einsum("ghid,jgd->ghij", _split_heads(q, k.shape[1]), k) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores
