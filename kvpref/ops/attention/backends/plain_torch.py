"""Shared by the backends in plain torch: scores of some queries over their keys, softmax, and the gradients.

Shape legend: T queries and P keys of a call, I queries and J keys of a tile, H heads, G key/value heads, D head dim of
queries and keys, E that of values.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import torch

from kvpref.ops.attention.backends.interface import Abilities, Backend, Needs
from kvpref.ops.attention.block import AttentionParams, VarlenBlock


class Tile(NamedTuple):
    """Queries [q0, q1) of a pair and keys [k0, k1), which include all keys that the queries see."""

    q0: int
    q1: int
    k0: int
    k1: int
    query: int
    """Place of the first query in its pair."""
    key: int
    """Place of the first key in its pair."""


class PlainTorch(Backend):
    """Every shape, window and softcap, any device, any float dtype; computes in fp32, or fp64 for fp64 inputs."""

    can: ClassVar[Abilities] = Abilities(
        windows=True, anti_causal=True, key_ranges=True, value_head_dims=True, softcap=True
    )

    @abstractmethod
    def tiles(self, block: VarlenBlock, num_heads: int) -> Iterable[Tile]:
        """The pairs of a block, cut into tiles of (H, I, J) scores that are computed one at a time."""

    def refusal(self, query: torch.Tensor, needs: Needs) -> str | None:
        return None if query.is_floating_point() else f"it needs a float dtype, got {query.dtype}"

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, num_kv_heads = _upcast(q), k.shape[1]
        out = q.new_zeros((*q.shape[:2], v.shape[2]))
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"))
        for tile in self.tiles(block, q.shape[1]):
            queries, keys = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
            scores, _ = _scores(_by_group(q[queries], num_kv_heads), _heads_first(k[keys]), params)
            scores = _masked(scores, block, tile)
            largest = scores.amax(dim=-1, keepdim=True)
            probs = scores.sub_(largest).exp_()
            total = probs.sum(dim=-1, keepdim=True)
            out[queries] = _by_row(torch.bmm(probs, _heads_first(v[keys])).div_(total), tile)
            lse[:, queries] = (largest + total.log()).view(q.shape[1], -1)
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
        q, dout, num_kv_heads = _upcast(q), _upcast(dout), k.shape[1]
        dq, dk, dv = torch.zeros_like(q), _zeros_like(k, q.dtype), _zeros_like(v, q.dtype)
        delta = (dout * _upcast(out)).sum(-1).T  # (H, T)
        for tile in self.tiles(block, q.shape[1]):
            queries, keys = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
            tile_lse, tile_delta = (rows[:, queries].reshape(num_kv_heads, -1, 1) for rows in (lse, delta))
            tile_q, tile_dout = _by_group(q[queries], num_kv_heads), _by_group(dout[queries], num_kv_heads)
            tile_k = _heads_first(k[keys])
            scores, slope = _scores(tile_q, tile_k, params)
            probs = _masked(scores, block, tile).sub_(tile_lse).exp_()
            dv[keys] += torch.bmm(probs.transpose(1, 2), tile_dout).transpose(0, 1)
            dscores = torch.bmm(tile_dout, _heads_first(v[keys]).transpose(1, 2)).sub_(tile_delta).mul_(probs)
            dscores = dscores.mul_(params.scale) if slope is None else dscores.mul_(slope).mul_(params.scale)
            dq[queries] += _by_row(torch.bmm(dscores, tile_k), tile)
            dk[keys] += torch.bmm(dscores.transpose(1, 2), tile_q).transpose(0, 1)
        return dq, dk, dv


def _upcast(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _zeros_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _by_group(rows: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """(I, H, D) -> (G, H/G * I, D): the query heads that share keys are rows of one matrix."""
    return rows.transpose(0, 1).reshape(num_kv_heads, -1, rows.shape[2])


def _by_row(grouped: torch.Tensor, tile: Tile) -> torch.Tensor:
    """(G, H/G * I, D) -> (I, H, D)."""
    return grouped.view(-1, tile.q1 - tile.q0, grouped.shape[2]).transpose(0, 1)


def _heads_first(rows: torch.Tensor) -> torch.Tensor:
    """(J, G, D) -> (G, J, D)."""
    return _upcast(rows).transpose(0, 1)


def _scores(q: torch.Tensor, k: torch.Tensor, params: AttentionParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(G, H/G * I, J), scaled and capped, and the slope of the cap there; None without one."""
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(params.scale)
    if params.softcap is None:
        return scores, None
    share = scores.div_(params.softcap).tanh_()
    return share * params.softcap, 1 - share.square()


def _masked(scores: torch.Tensor, block: VarlenBlock, tile: Tile) -> torch.Tensor:
    """The scores with -inf, in place, where a query does not see a key."""
    if block.shape == "rectangle":
        return scores
    num_queries, num_keys = tile.q1 - tile.q0, tile.k1 - tile.k0
    queries = torch.arange(tile.query, tile.query + num_queries, device=scores.device).unsqueeze(1)
    keys = torch.arange(tile.key, tile.key + num_keys, device=scores.device)
    hidden = keys > queries if block.causal else keys < queries
    if block.window is not None:
        hidden = hidden | (queries - keys >= block.window)
    scores.view(-1, num_queries, num_keys).masked_fill_(hidden, float("-inf"))
    return scores
