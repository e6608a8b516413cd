"""Every segment begins where its parent ended: states are strings of tokens here."""

from __future__ import annotations

import pytest
from sample_groups import five_levels, pairs, shared_system_prompt, story_questions_answers

from kvpref.prefix.building import build_tree
from kvpref.prefix.chunks import SlabKey, build_chunks
from kvpref.prefix.levels import build_layout, build_levels
from kvpref.prefix.segments import BEGINNING, NO_STATES, SegmentLayout, level_segments
from kvpref.prefix.tree import PrefixTree

TokenIds = tuple[int, ...]

GROUPS = {
    "pairs": pairs(),
    "three levels": story_questions_answers(),
    "five levels": five_levels(),
    "system": shared_system_prompt(),
}


def _run(layout: SegmentLayout, row: TokenIds, before: list[TokenIds]) -> tuple[list[TokenIds], list[TokenIds]]:
    """Each segment's state after its last token, and those that are kept."""
    ends, start = [], 0
    for length, parent in zip(layout.lengths, layout.parents, strict=True):
        ends.append((() if parent == BEGINNING else before[parent]) + row[start : start + length])
        start += length
    assert start == len(row)
    return ends, [ends[place] for place in layout.kept]


def _tree(name: str) -> PrefixTree:
    return build_tree(
        [sequence.input_ids for group in GROUPS[name] for sequence in group.sequences], branches_inside=False
    )


@pytest.mark.parametrize("name", GROUPS)
def test_levels(name: str) -> None:
    tree = _tree(name)
    levels = build_levels(tree)
    kept: list[TokenIds] = []
    found: dict[int, TokenIds] = {}
    for level, layout in zip(levels, level_segments(tree, levels), strict=True):
        row = tuple(token for index in level.segments for token in tree.segments[index].input_ids)
        ends, kept = _run(layout, row, kept)
        found.update(zip(level.segments, ends, strict=True))
    assert not kept  # nothing reads what the last level leaves
    for index in range(len(tree.paths)):
        sequence = tree.sequence(index)
        assert found[tree.paths[index][-1]][: len(sequence)] == sequence


@pytest.mark.parametrize("max_tokens", [None, 1, 3, 5, 12])
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("tells_prompts", [False, True])
def test_chunks(name: str, max_tokens: int | None, tells_prompts: bool) -> None:
    """Also across micro-batches that share a prompt."""
    tree = _tree(name)
    sequences = [sequence for group in GROUPS[name] for sequence in group.sequences]
    scored = [sequence.scored for sequence in sequences]
    owners = [index for index, group in enumerate(GROUPS[name]) for _ in group.sequences]
    cut = build_chunks(
        tree, build_layout(tree, scored), owners, max_tokens=max_tokens, scored=scored if tells_prompts else None
    )
    slabs: dict[SlabKey, list[TokenIds]] = {key: [()] * number for key, number in cut.slab_states.items()}
    ends = set()
    for chunk in (chunk for chunks in cut.chunks.values() for chunk in chunks):
        before = [state for slab, start, stop in chunk.states.reads for state in slabs[slab][start:stop]]
        assert all(before)  # they were left before
        all_ends, kept = _run(chunk.states.layout, tuple(chunk.input_ids.tolist()), before)
        ends.update(all_ends)
        first = chunk.states.first
        assert not any(slabs[chunk.slab][first : first + len(kept)])
        slabs[chunk.slab][first : first + len(kept)] = kept
        assert not kept or chunk.slab_start is not None
    assert all(state for states in slabs.values() for state in states)
    whole = {end[:length] for end in ends for length in range(1, len(end) + 1)}
    assert whole.issuperset(sequence.input_ids for sequence in sequences)


def test_no_state_is_left_where_sequences_branch_off_inside_segments() -> None:
    tree = build_tree([(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 6), (1, 7)])
    assert tree.branches_inside
    assert level_segments(tree, build_levels(tree)) == ()
    layout = build_layout(tree, [[False] * len(ids) for ids in tree.sequences])
    for chunk in build_chunks(tree, layout, [0] * 4, max_tokens=2).chunks[0]:
        assert chunk.states is NO_STATES
