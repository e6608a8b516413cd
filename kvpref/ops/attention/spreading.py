"""Short prefixes with many queries: copies of their keys and values give the backward kernels enough thread blocks.

The kernels give the gradient of a tile of keys to one thread block per head. One prompt of 200 tokens makes 2 tiles,
and with 32 heads 64 thread blocks, on a GPU with 132 multiprocessors. Offsets cannot say that several pairs have the
same keys, so the keys of each prefix are copied, each copy is read by a part of the queries, and the copies' gradients
are added up in fp32. Off until `benchmarks/` has measured at which lengths it pays; see `spread_keys_below`.

Shape legend: T queries, P keys, C copied keys, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from kvpref.ops.attention.backends.interface import Backend
from kvpref.ops.attention.block import AttentionParams, BlockKind, VarlenBlock, read_offsets
from kvpref.records.host_copies import to_device

DEFAULT_KEYS_BELOW = 0
"""Blocks whose longest key range is shorter are spread; 0 spreads none. To be set from measurements on a GPU."""
_MIN_QUERIES = 256
"""Fewest queries per copy: two tiles."""
_TILE_KEYS = 128
_BLOCKS_PER_PROCESSOR = 2

_keys_below = DEFAULT_KEYS_BELOW


@contextmanager
def spread_keys_below(num_keys: int) -> Iterator[None]:
    """Spread the cross blocks whose longest key range is shorter than `num_keys` tokens; 0 spreads none.

    This holds for the whole process: autograd runs the backward pass of a CUDA device in a separate thread.
    """
    global _keys_below
    before, _keys_below = _keys_below, num_keys
    try:
        yield
    finally:
        _keys_below = before


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """A block over copied keys.

    Attributes:
        block: Its pairs; each reads a copy of its own.
        sources: (C,) int64, the key row that each copied row is a copy of.
        copies: (P, most copies) int64, where the copies of each key row are; filled up with C.
    """

    block: VarlenBlock
    sources: torch.Tensor
    copies: torch.Tensor


def spread_backward(
    backend: Backend,
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    merged: tuple[torch.Tensor, torch.Tensor],
    block: VarlenBlock,
    params: AttentionParams,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`Backend.backward`, on copied keys if there are too few keys to keep the device busy."""
    out, lse = merged
    spread = _spread(block, query)
    if spread is None:
        return backend.backward(dout, query, key, value, out, lse, block, params)
    keys, values = key[spread.sources], value[spread.sources]
    dq, dks, dvs = backend.backward(dout, query, keys, values, out, lse, spread.block, params)
    return dq, _sum_of_copies(dks, spread.copies), _sum_of_copies(dvs, spread.copies)


def _sum_of_copies(grads: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
    """(C, G, D) -> (P, G, D), in fp32 or wider, always in the same order."""
    wide = grads if grads.dtype == torch.float64 else grads.float()
    none = wide.new_zeros((1, *wide.shape[1:]))
    return torch.cat([wide, none])[copies].sum(dim=1)


def _spread(block: VarlenBlock, query: torch.Tensor) -> Spread | None:
    if block.shape != "rectangle" or block.max_seqlen_k >= _keys_below:
        return None
    wanted = _BLOCKS_PER_PROCESSOR * _num_processors(query.device)
    return plan_spread(block.offsets_key, query.shape[1], wanted, query.device)


@lru_cache(maxsize=1)
def _num_processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 0 elsewhere, where none could be idle."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=32)  # the layers of a backward pass need the same blocks
def plan_spread(offsets_key: bytes, num_heads: int, wanted_blocks: int, device: torch.device) -> Spread | None:
    """Copy each key range until there are as many thread blocks as wanted, or its queries are too few to share.

    Args:
        offsets_key: The block's `VarlenBlock.offsets_key`.
        num_heads: Thread blocks per tile of keys.
        wanted_blocks: Thread blocks that keep the device busy.
        device: Where the spread block's tensors go.

    Returns:
        The plan; None if no key range is copied.
    """
    offsets_q, offsets_k = read_offsets(offsets_key).tolist()
    pairs = list(zip(pairwise(offsets_q), pairwise(offsets_k), strict=True))
    num_tiles = sum(-(-(k1 - k0) // _TILE_KEYS) for (q0, q1), (k0, k1) in pairs if q1 > q0)
    most = -(-wanted_blocks // max(1, num_tiles * num_heads))
    counts = [max(1, min(most, (q1 - q0) // _MIN_QUERIES)) for (q0, q1), _ in pairs]
    if max(counts) == 1:
        return None
    new_q, new_k, sources = [0], [0], []
    num_copied = sum(count * (k1 - k0) for count, (_, (k0, k1)) in zip(counts, pairs, strict=True))
    copies = np.full((offsets_k[-1], max(counts)), num_copied)
    for count, ((q0, q1), (k0, k1)) in zip(counts, pairs, strict=True):
        for number in range(count):
            copies[k0:k1, number] = np.arange(new_k[-1], new_k[-1] + k1 - k0)
            sources.append(np.arange(k0, k1))
            new_k.append(new_k[-1] + k1 - k0)
            new_q.append(q0 + (q1 - q0) * (number + 1) // count)
    offsets = np.array([new_q, new_k], dtype=np.int32)
    cu_seqlens = to_device(torch.from_numpy(offsets), device)
    return Spread(
        block=VarlenBlock.from_offsets(offsets.tobytes(), cu_seqlens, BlockKind(shape="rectangle")),
        sources=to_device(torch.from_numpy(np.concatenate(sources)), device),
        copies=to_device(torch.from_numpy(copies), device),
    )
