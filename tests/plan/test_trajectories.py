"""Every row of random trees of trajectories sees exactly the tokens before it that its rule lets it see."""

from __future__ import annotations

import pytest
from random_trajectories import KINDS, trajectories

import kvpref
from kvpref import Group, Sequence
from kvpref.plan.passes import LevelBlocks, ModePlan
from kvpref.plan.step import join_batches
from kvpref.prefix.rules import CAUSAL, Rule

Token = tuple[int, int]
"""Position and id."""

RULES = (Rule("window", 3), Rule("chunk", 4))


def seen_in(level: LevelBlocks, own: list[Token], sources: list[list[Token]]) -> list[list[Token]]:
    """Per row of a level the tokens that it sees, in order."""
    seen: list[list[Token]] = [[] for _ in own]
    for block in level.blocks:
        keys = own if block.source == 0 else sources[block.source - 1]
        for first, stop, first_key, stop_key in block.pairs:
            for row in range(first, stop):
                place = row - first
                start = first_key + (place if block.shape == "anti_causal" else 0)
                end = first_key + place + 1 if block.shape == "causal" else stop_key
                start = max(start, end - block.window) if block.window else start
                seen[row] += keys[start:end]
    return [sorted(row) for row in seen]


def rows_of_plan(plan: ModePlan, rule: Rule) -> list[list[Token]]:
    found: list[list[Token]] = []
    sources: list[list[Token]] = []
    for item in plan.passes:
        tokens = list(zip(item.position_ids[0].tolist(), item.input_ids[0].tolist(), strict=True))
        for level in item.levels_under(rule):
            own, tokens = tokens[: level.num_rows], tokens[level.num_rows :]
            found += seen_in(level, own, sources)
            sources.append(own)
    return found


def rows_of_chunks(sequences: list[Sequence], max_tokens: int, prefix_grad: bool, rule: Rule) -> list[list[Token]]:
    """The sequences as two micro-batches of one step."""
    half = len(sequences) // 2
    batches = [kvpref.collate([Group(own)], min_shared_tokens=1) for own in (sequences[:half], sequences[half:])]
    slabs: dict[object, dict[int, Token]] = {}
    found: list[list[Token]] = []
    for chunk in join_batches(batches, max_tokens_per_chunk=max_tokens, prefix_grad=prefix_grad).chunks.all:
        own = list(zip(chunk.item.position_ids[0].tolist(), chunk.item.input_ids[0].tolist(), strict=True))
        # KeyError: read before it was written.
        sources = [[slabs[read.slab][row] for row in range(read.start, read.stop)] for read in chunk.reads]
        found += seen_in(chunk.item.levels_under(rule)[0], own, sources)
        if chunk.writes is not None:
            slabs.setdefault(chunk.writes.slab, {}).update(
                zip(range(chunk.writes.start, chunk.writes.stop), own, strict=True)
            )
    return found


def assert_exact(causal: list[list[Token]], ruled: dict[Rule, list[list[Token]]], sequences: list[Sequence]) -> None:
    histories = {tuple(enumerate(each.input_ids[: stop + 1])) for each in sequences for stop in range(len(each))}
    assert sorted(map(tuple, causal)) == sorted(histories), "each beginning runs once"
    for rule, rows in ruled.items():
        for before, row in zip(causal, rows, strict=True):
            assert row == before[rule.first_key(len(before) - 1) :], rule


@pytest.mark.parametrize("kind", KINDS)
def test_modes(kind: str) -> None:
    for seed in range(4):
        sequences = trajectories(kind, seed)
        batch = kvpref.collate([Group(sequences)], min_shared_tokens=1)
        for mode in ("two_pass", "one_pass"):
            plan = batch.plan(mode)
            assert_exact(rows_of_plan(plan, CAUSAL), {rule: rows_of_plan(plan, rule) for rule in RULES}, sequences)


@pytest.mark.parametrize("prefix_grad", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks(kind: str, prefix_grad: bool) -> None:
    for seed, max_tokens in enumerate((1, 4, 50)):
        sequences = trajectories(kind, seed)
        causal, *others = (rows_of_chunks(sequences, max_tokens, prefix_grad, rule) for rule in (CAUSAL, *RULES))
        assert_exact(causal, dict(zip(RULES, others, strict=True)), sequences)
