"""Blocks under a rule against masks written out pair by pair."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise

import pytest

from kvpref.prefix.blocks import PlacedBlocks, VarlenLayout
from kvpref.prefix.building import build_tree, build_unshared_tree
from kvpref.prefix.chunks import build_chunks
from kvpref.prefix.levels import build_layout, build_levels
from kvpref.prefix.rules import CAUSAL, Rule
from kvpref.prefix.shapes import blocks_under, window_blocks

Seen = set[tuple[int, int, int]]
"""The (source, query row, key row) that meet."""


def test_under_causal_the_blocks_are_those_of_the_level() -> None:
    level = random_level(random.Random(0))
    assert blocks_under(level, CAUSAL) == (level.self_block, *level.cross_blocks)


@pytest.mark.parametrize("kind", ["window", "chunk", "dense"])
def test_blocks_hold_the_pairs_of_the_mask_and_each_once(kind: str) -> None:
    for seed in range(400 if kind == "dense" else 1500):
        generator = random.Random(seed)
        level = random_level(generator)
        rule = random_rule(generator, kind)
        blocks = blocks_under(level, rule)
        expected = masked(level, rule)
        assert seen_once(blocks) == expected, (seed, rule)


def test_a_rule_that_takes_nothing_away_leaves_every_block_as_it_is() -> None:
    for seed in range(100):
        level = random_level(random.Random(seed))
        for rule in (Rule("window", 1000), Rule("chunk", 1000)):
            assert blocks_under(level, rule) == (level.self_block, *level.cross_blocks)


def test_neighbours_with_equal_keys_are_one_pair_and_unread_prefixes_have_no_block() -> None:
    responses = [(1, 2, 3, 4, 10 + i, 20 + i) for i in range(3)]
    _, level = build_levels(build_tree(responses))
    rectangle, square = blocks_under(level, Rule("window", 4))[1:]
    # Each response has two tokens: both see the keys at 2 and 3, its first sees the key at 1 besides.
    assert [pair for pair in zip(*_pairs(rectangle), strict=True) if pair[1]] == [(0, 6, 2, 2)]
    assert rectangle.key_starts is None
    assert [pair for pair in zip(*_pairs(square), strict=True) if pair[3]] == [(0, 1, 1, 1), (2, 1, 1, 1), (4, 1, 1, 1)]
    assert square.key_starts is not None
    assert len(blocks_under(level, Rule("window", 1))) == 1
    assert len(blocks_under(level, Rule("chunk", 4))) == 1


def test_a_window_in_a_self_block_is_squares_and_rectangles() -> None:
    for seed in range(2000):
        generator = random.Random(seed)
        lengths = [generator.randint(1, 14) for _ in range(generator.randint(1, 4))]
        offsets = tuple(accumulate(lengths, initial=0))
        window = generator.choice((1, 2, 3, 5, 14))
        whole = VarlenLayout(cu_seqlens_q=offsets, cu_seqlens_k=offsets, shape="causal", window=window)
        assert seen_once(window_blocks(offsets, window)) == seen_once((whole,)), (lengths, window)


def test_the_pairs_of_a_window_grow_with_the_window_and_not_with_the_prompt() -> None:
    def num_pairs(prompt: int, rule: Rule) -> int:
        ids = tuple(range(prompt))
        _, level = build_levels(build_tree([(*ids, *range(first, first + 8)) for first in (10_000, 20_000, 30_000)]))
        return len(seen_once(blocks_under(level, rule)))

    assert num_pairs(40, Rule("window", 10)) == num_pairs(400, Rule("window", 10)) == 3 * 8 * 10
    assert num_pairs(40, Rule("chunk", 10)) == num_pairs(400, Rule("chunk", 10)) == 3 * 8 * 9 // 2
    assert num_pairs(400, CAUSAL) == 3 * (8 * 400 + 8 * 9 // 2)


def random_rule(generator: random.Random, kind: str) -> Rule:
    if kind != "dense":
        return Rule(kind, generator.choice((1, 2, 3, 4, 5, 6, 8, 13, 100)))
    rows = []
    for position in range(60):
        keys = [key for key in range(position + 1) if key == position or generator.random() < 0.6]
        cuts = [key for key in keys if key - 1 not in keys], [key + 1 for key in keys if key + 1 not in keys]
        rows.append(tuple(zip(*cuts, strict=True)))
    return Rule("dense", ranges=tuple(rows))


def random_level(generator: random.Random) -> PlacedBlocks:
    """A level of a random tree, or a chunk of one."""
    prompts = [tuple(generator.randrange(3) for _ in range(generator.randint(1, 9))) for _ in range(3)]
    sequences = []
    for _ in range(generator.randint(1, 7)):
        sequence = tuple(token for _ in range(generator.randint(1, 3)) for token in generator.choice(prompts))
        sequences.append(sequence + tuple(generator.randrange(3) for _ in range(generator.randint(0, 6))))
    if generator.random() < 0.1:
        return generator.choice(build_levels(build_unshared_tree(sequences)))
    tree = build_tree(sequences, min_shared_tokens=generator.choice((1, 1, 4)))
    if generator.random() < 0.5:
        return generator.choice(build_levels(tree)).placed
    layout = build_layout(tree, [(False, *[True] * (len(sequence) - 1)) for sequence in sequences])
    owners = sorted(generator.randrange(2) for _ in sequences)
    chunks = build_chunks(tree, layout, owners, max_tokens=generator.choice((1, 2, 3, 5, 8, 50)))
    return generator.choice([chunk for several in chunks.chunks.values() for chunk in several]).placed


def masked(level: PlacedBlocks, rule: Rule) -> Seen:
    """What the causal blocks of a level hold and the rule lets meet."""
    positions: dict[tuple[int, int], int] = {}
    for (start, stop), first in zip(pairwise(level.self_block.cu_seqlens_q), level.query_positions, strict=True):
        positions.update({(0, row): first + row - start for row in range(start, stop)})
    for block, firsts in zip(level.cross_blocks, level.key_positions, strict=True):
        for (start, stop), first in zip(pairwise(block.cu_seqlens_k), firsts, strict=True):
            positions.update({(block.source, row): first + row - start for row in range(start, stop)})

    def meet(q: int, k: int) -> bool:
        if rule.kind == "window":
            return q - k < rule.size
        if rule.kind == "chunk":
            return q // rule.size == k // rule.size
        return any(first <= k < stop for first, stop in rule.ranges[q])

    causal = seen_once((level.self_block, *level.cross_blocks))
    return {(source, q, k) for source, q, k in causal if meet(positions[0, q], positions[source, k])}


def seen_once(blocks: tuple[VarlenLayout, ...]) -> Seen:
    """The pairs of all blocks, none of them twice, and no row in two pairs of one block."""
    seen: list[tuple[int, int, int]] = []
    for block in blocks:
        rows: list[int] = []
        for query, num_queries, key, num_keys in zip(*_pairs(block), strict=True):
            rows.extend(range(query, query + num_queries) if num_keys else ())
            if block.shape != "rectangle" and num_keys and num_queries:
                assert num_queries == num_keys
            seen.extend(
                (block.source, query + i, key + j)
                for i in range(num_queries)
                for j in range(num_keys)
                if {"rectangle": True, "causal": j <= i, "anti_causal": j >= i}[block.shape]
                and (block.window is None or i - j < block.window)
            )
        assert len(set(rows)) == len(rows)
    assert len(set(seen)) == len(seen)
    return set(seen)


def _pairs(block: VarlenLayout) -> tuple[list[int], list[int], list[int], list[int]]:
    """First query, number of queries, first key and number of keys of each pair."""
    num_queries = [stop - start for start, stop in pairwise(block.cu_seqlens_q)]
    num_keys = [stop - start for start, stop in pairwise(block.cu_seqlens_k)]
    starts = block.cu_seqlens_k[:-1] if block.key_starts is None else block.key_starts
    assert len(num_queries) == len(num_keys) == len(starts)
    return list(block.cu_seqlens_q[:-1]), num_queries, list(starts), num_keys
