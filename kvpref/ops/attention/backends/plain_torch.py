"""What the backends in plain torch share: scores of some queries over their keys, softmax, and the gradients.

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
    """Queries [q0, q1) of a pair with keys [k0, k1), among them all that the queries see."""

    q0: int
    q1: int
    k0: int
    k1: int
    query: int
    """Place of the first query in its pair."""
    key: int
    """Place of the first key in its pair."""


class PlainTorch(Backend):
    """Every shape, window and softcap, any device, any float dtype; computes in fp32, or fp64 for fp64 inputs.

    Rows of a tile that no other row shares a key with are independent of the tiles before, so results are the same
    however pairs are cut.
    """

    can: ClassVar[Abilities] = Abilities(
        windows=True, anti_causal=True, key_ranges=True, value_head_dims=True, softcap=True
    )

    @abstractmethod
    def tiles(self, block: VarlenBlock, num_heads: int) -> Iterable[Tile]:
        """The pairs of a block, cut into what is computed at a time: (H, I, J) scores."""

    def refusal(self, query: torch.Tensor, needs: Needs) -> str | None:
        return None if query.is_floating_point() else f"it needs a float dtype, got {query.dtype}"

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q = _upcast(q)
        out = q.new_zeros((*q.shape[:2], v.shape[2]))
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"))
        for tile in self.tiles(block, q.shape[1]):
            queries, keys = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
            scores, _ = _scores(q[queries], _upcast(k[keys]), params)
            scores = _masked(scores, block, tile)
            tile_lse = torch.logsumexp(scores, dim=-1)
            probs = torch.exp(scores - tile_lse.unsqueeze(-1))
            out[queries] = _merge_heads(torch.einsum("ghij,jgd->ghid", probs, _upcast(v[keys])))
            lse[:, queries] = tile_lse.flatten(0, 1)
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
            tile_lse, tile_delta = (
                rows[:, queries].unflatten(0, (num_kv_heads, -1)).unsqueeze(-1) for rows in (lse, delta)
            )
            tile_k = _upcast(k[keys])
            scores, slope = _scores(q[queries], tile_k, params)
            probs = torch.exp(_masked(scores, block, tile) - tile_lse)
            heads = _split_heads(dout[queries], num_kv_heads)
            dv[keys] += torch.einsum("ghij,ghid->jgd", probs, heads)
            dscores = probs * (torch.einsum("ghid,jgd->ghij", heads, _upcast(v[keys])) - tile_delta) * params.scale
            if slope is not None:
                dscores = dscores * slope
            dq[queries] += _merge_heads(torch.einsum("ghij,jgd->ghid", dscores, tile_k))
            dk[keys] += torch.einsum("ghij,ghid->jgd", dscores, _split_heads(q[queries], num_kv_heads))
        return dq, dk, dv


def _upcast(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _zeros_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _split_heads(tensor: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """(T, H, D) -> (G, H/G, T, D)."""
    return tensor.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _merge_heads(tensor: torch.Tensor) -> torch.Tensor:
    """(G, H/G, T, D) -> (T, H, D)."""
    return tensor.permute(2, 0, 1, 3).flatten(1, 2)


def _scores(q: torch.Tensor, k: torch.Tensor, params: AttentionParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(G, H/G, I, J), scaled and capped, and the slope of the cap there; None without one."""
    scores = torch.einsum("ghid,jgd->ghij", _split_heads(q, k.shape[1]), k) * params.scale
    if params.softcap is None:
        return scores, None
    share = torch.tanh(scores / params.softcap)
    return params.softcap * share, 1 - share.square()


def _masked(scores: torch.Tensor, block: VarlenBlock, tile: Tile) -> torch.Tensor:
    """With -inf where a query does not see a key."""
    if block.shape == "rectangle":
        return scores
    queries = torch.arange(tile.query, tile.query + scores.shape[-2], device=scores.device).unsqueeze(1)
    keys = torch.arange(tile.key, tile.key + scores.shape[-1], device=scores.device)
    hidden = keys > queries if block.causal else keys < queries
    if block.window is not None:
        hidden = hidden | (queries - keys >= block.window)
    return scores.masked_fill(hidden, float("-inf"))
