"""Dense attention over a whole path, from the tree alone: the oracle of the attention tests."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from unique_tokens import seen_by

from kvpref.ops.attention import AttentionParams, CascadePlan, VarlenBlock
from kvpref.prefix.building import build_tree
from kvpref.prefix.levels import build_layout
from kvpref.prefix.tree import PrefixTree


class Inputs(NamedTuple):
    """One pass over the deepest level of a tree, with the slabs of the levels above."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    prefixes: list[tuple[torch.Tensor, torch.Tensor]]

    def leaves(self) -> list[torch.Tensor]:
        return [self.query, self.key, self.value, *(tensor for pair in self.prefixes for tensor in pair)]


def random_tree(seed: int, num_sequences: int = 9) -> PrefixTree:
    """At least two levels; segments of one token, segments without children, several roots."""
    generator = random.Random(seed)
    prompts = [[root, *(generator.choice((7, 8)) for _ in range(generator.randint(0, 5)))] for root in (1, 1, 2, 3)]
    sequences = [
        (*generator.choice(prompts), *(generator.choice((7, 8, 9)) for _ in range(generator.randint(1, 6))))
        for _ in range(num_sequences)
    ]
    return build_tree([*sequences, (1, 7, 7, 9), (1, 7, 7, 8), (4, 5)])


def make_plan(tree: PrefixTree, depth: int, backend: str, scale: float) -> CascadePlan:
    level = build_layout(tree, [[False] * len(tree.sequence(i)) for i in range(len(tree.paths))]).levels[depth]
    return CascadePlan(
        blocks=tuple(VarlenBlock.from_layout(block) for block in (level.self_block, *level.cross_blocks)),
        params=AttentionParams(scale=scale),
        backend=backend,
    )


def num_rows(tree: PrefixTree, depth: int) -> int:
    return sum(len(segment) for segment in tree.segments if segment.depth == depth)


def make_inputs(
    tree: PrefixTree, depth: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float64
) -> Inputs:
    generator = torch.Generator().manual_seed(depth + 10 * head_dim)

    def rows(count: int, heads: int) -> torch.Tensor:
        # 1.5 makes some rows attend sharply and others broadly.
        return (1.5 * torch.randn(count, heads, head_dim, generator=generator, dtype=torch.float64)).to(dtype)

    count = num_rows(tree, depth)
    prefixes = [tuple(rows(num_rows(tree, above), num_kv_heads) for _ in range(2)) for above in range(depth)]
    inputs = Inputs(rows(count, num_heads), rows(count, num_kv_heads), rows(count, num_kv_heads), prefixes)
    for leaf in inputs.leaves():
        leaf.requires_grad_()
    return inputs


def visible(tree: PrefixTree, depth: int) -> torch.Tensor:
    """(T_d, T_0 + ... + T_d) bool: which keys each query row sees, level by level."""
    rows = [
        [
            (i, offset)
            for i, segment in enumerate(tree.segments)
            if segment.depth == level
            for offset in range(len(segment))
        ]
        for level in range(depth + 1)
    ]
    keys = [place for level in rows for place in level]
    mask = torch.zeros(len(rows[depth]), len(keys), dtype=torch.bool)
    for q, (segment, offset) in enumerate(rows[depth]):
        seen = {**seen_by(tree, segment), segment: offset + 1}
        for k, (other, other_offset) in enumerate(keys):
            mask[q, k] = other_offset < seen.get(other, 0)
    return mask


def dense_attention(inputs: Inputs, tree: PrefixTree, depth: int, scale: float) -> torch.Tensor:
    """(T, H, D): softmax attention in the inputs' dtype over the concatenation of all keys."""
    ratio = inputs.query.shape[1] // inputs.key.shape[1]
    key = torch.cat([*(k for k, _ in inputs.prefixes), inputs.key]).repeat_interleave(ratio, dim=1)
    value = torch.cat([*(v for _, v in inputs.prefixes), inputs.value]).repeat_interleave(ratio, dim=1)
    scores = torch.einsum("qhd,khd->hqk", inputs.query, key) * scale
    probabilities = scores.masked_fill(~visible(tree, depth), float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, value)
