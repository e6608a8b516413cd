"""The prefix tree: every sequence comes back, nothing is stored twice, limits hold at the least cost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_lists import token_lists

from kvpref.prefix.tree import PrefixTree, build_tree, build_unshared_tree, cut_segments, shared_prefix_length

limits = st.tuples(st.integers(1, 4), st.one_of(st.none(), st.integers(0, 3)))


def trie_size(sequences: list[tuple[int, ...]]) -> int:
    """Number of distinct non-empty prefixes: what a tree that stores no token twice holds."""
    return len({ids[:end] for ids in sequences for end in range(1, len(ids) + 1)})


def check_structure(tree: PrefixTree) -> None:
    for index, segment in enumerate(tree.segments):
        assert len(segment) >= 1
        if segment.parent is None:
            assert (segment.depth, segment.start) == (0, 0)
        else:
            parent = tree.segments[segment.parent]
            assert segment.parent < index
            assert segment.depth == parent.depth + 1
            assert segment.start == parent.start + len(parent)
    for path in tree.paths:
        assert [tree.segments[index].depth for index in path] == list(range(len(path)))
        assert [tree.segments[index].parent for index in path] == [None, *path[:-1]]
    # Every segment is on some sequence's path.
    assert {index for path in tree.paths for index in path} == set(range(len(tree.segments)))


def ancestors(tree: PrefixTree, index: int) -> list[int]:
    found = []
    parent = tree.segments[index].parent
    while parent is not None:
        found.append(parent)
        parent = tree.segments[parent].parent
    return found


@given(token_lists, limits)
def test_every_sequence_is_recovered_from_its_path(
    sequences: list[tuple[int, ...]], limit: tuple[int, int | None]
) -> None:
    tree = build_tree(sequences, min_shared_tokens=limit[0], max_depth=limit[1])
    check_structure(tree)
    assert [tree.sequence(index) for index in range(len(sequences))] == sequences


@given(token_lists)
def test_no_token_is_stored_twice_without_limits(sequences: list[tuple[int, ...]]) -> None:
    tree = build_tree(sequences)
    assert tree.num_unique_tokens == trie_size(sequences)
    firsts = [(segment.parent, segment.input_ids[0]) for segment in tree.segments]
    assert len(set(firsts)) == len(firsts)


@given(token_lists, limits)
def test_limits_are_respected(sequences: list[tuple[int, ...]], limit: tuple[int, int | None]) -> None:
    min_shared_tokens, max_depth = limit
    tree = build_tree(sequences, min_shared_tokens=min_shared_tokens, max_depth=max_depth)
    parents = {segment.parent for segment in tree.segments if segment.parent is not None}
    assert all(len(tree.segments[index]) >= min_shared_tokens for index in parents)
    assert max_depth is None or tree.num_levels <= max_depth + 1


@given(token_lists, limits)
def test_descendants_are_contiguous_in_depth_first_order(
    sequences: list[tuple[int, ...]], limit: tuple[int, int | None]
) -> None:
    tree = build_tree(sequences, min_shared_tokens=limit[0], max_depth=limit[1])
    for index in range(len(tree.segments)):
        below = [other for other in range(len(tree.segments)) if index in ancestors(tree, other)]
        assert below == list(range(index + 1, index + 1 + len(below)))


def cheapest(
    sequences: frozenset[tuple[int, ...]], start: int, depth: int, min_shared_tokens: int, max_depth: int | None
) -> int:
    """Fewest tokens for distinct sequences that agree up to `start`, by trying every way to cut and to group them.

    A segment with children may end at any offset here, and what shares a first token may still be stored apart, so the
    search is not built on the radix tree's nodes.
    """
    total = 0
    rest = [ids for ids in sequences if len(ids) > start]
    for _, same_first in itertools.groupby(sorted(rest), key=lambda ids: ids[start]):
        total += _cheapest_bundle(frozenset(same_first), start, depth, min_shared_tokens, max_depth)
    return total


def _cheapest_bundle(
    bundle: frozenset[tuple[int, ...]], start: int, depth: int, min_shared_tokens: int, max_depth: int | None
) -> int:
    best = sum(len(ids) - start for ids in bundle)
    if max_depth is not None and depth >= max_depth:
        return best
    ordered = sorted(bundle)
    # Choose which sequences sit behind one shared segment, and where it ends; the others are bundled on their own.
    for end in range(start + min_shared_tokens, max(map(len, ordered)) + 1):
        for prefix in {ids[:end] for ids in ordered if len(ids) >= end}:
            inside = frozenset(ids for ids in ordered if ids[:end] == prefix)
            if len(inside) < 2:
                continue
            outside = bundle - inside
            cost = end - start + cheapest(inside, end, depth + 1, min_shared_tokens, max_depth)
            if outside:
                cost += _cheapest_bundle(outside, start, depth, min_shared_tokens, max_depth)
            best = min(best, cost)
    return best


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple), min_size=1, max_size=5), limits)
def test_no_other_choice_of_segments_stores_fewer_tokens(
    sequences: list[tuple[int, ...]], limit: tuple[int, int | None]
) -> None:
    tree = build_tree(sequences, min_shared_tokens=limit[0], max_depth=limit[1])
    assert tree.num_unique_tokens == cheapest(frozenset(sequences), 0, 0, *limit)


@given(token_lists, limits, st.permutations(range(3)))
def test_the_tree_does_not_depend_on_token_values(
    sequences: list[tuple[int, ...]], limit: tuple[int, int | None], names: list[int]
) -> None:
    renamed = [tuple(names[token] for token in ids) for ids in sequences]
    first = build_tree(sequences, min_shared_tokens=limit[0], max_depth=limit[1])
    second = build_tree(renamed, min_shared_tokens=limit[0], max_depth=limit[1])
    assert first.paths == second.paths
    assert [(s.parent, s.depth, s.start, len(s)) for s in first.segments] == [
        (s.parent, s.depth, s.start, len(s)) for s in second.segments
    ]


@given(token_lists)
def test_segments_stand_in_the_callers_order(sequences: list[tuple[int, ...]]) -> None:
    """Siblings are ordered by the first sequence that they serve, so groups stay together in a pass."""
    tree = build_tree(sequences)
    first_use = [min(i for i, path in enumerate(tree.paths) if index in path) for index in range(len(tree.segments))]
    for parent in {segment.parent for segment in tree.segments}:
        children = [index for index, segment in enumerate(tree.segments) if segment.parent == parent]
        assert children == sorted(children, key=first_use.__getitem__)


@given(token_lists)
def test_unshared_tree_repeats_everything(sequences: list[tuple[int, ...]]) -> None:
    tree = build_unshared_tree(sequences)
    check_structure(tree)
    assert tree.num_unique_tokens == sum(map(len, sequences))
    assert tree.num_levels == 1
    assert [tree.sequence(index) for index in range(len(sequences))] == sequences


@given(token_lists.filter(lambda lists: len(lists) > 1))
def test_shared_prefix_length(sequences: list[tuple[int, ...]]) -> None:
    first, second = sequences[:2]
    expected = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    assert shared_prefix_length(first, second) == expected


def test_worked_example() -> None:
    tree = build_tree([(1, 2, 3, 4), (1, 2, 5), (9,), (1, 2, 3, 4)])
    assert [segment.input_ids for segment in tree.segments] == [(1, 2), (3, 4), (5,), (9,)]
    assert tree.paths == ((0, 1), (0, 2), (3,), (0, 1))


def test_a_short_shared_run_is_repeated_where_it_would_cost_a_longer_one() -> None:
    """Greedy sharing from the top would keep the first run, and leave no depth or length for what is worth more."""
    by_depth = build_tree([(1, *[row] * 4, end) for row in (2, 3) for end in (5, 6)], max_depth=1)
    assert [segment.input_ids for segment in by_depth.segments[:1]] == [(1, 2, 2, 2, 2)]
    assert by_depth.num_unique_tokens == 2 * 5 + 4
    by_length = build_tree([*((1, 1, 1, 2, 2, end) for end in range(5)), (1, 1, 1, 3)], min_shared_tokens=3)
    assert by_length.segments[0].input_ids == (1, 1, 1, 2, 2)
    assert by_length.num_unique_tokens == 5 + 5 + 4


def test_a_sequence_that_is_a_prefix_of_another_ends_inside_the_tree() -> None:
    tree = build_tree([(1, 2), (1, 2, 3)])
    assert tree.paths == ((0,), (0, 1))
    flat = build_tree([(1, 2), (1, 2, 3)], max_depth=0)
    assert [segment.input_ids for segment in flat.segments] == [(1, 2), (1, 2, 3)]


def test_long_chains_do_not_exhaust_the_stack() -> None:
    """Each sequence a prefix of the next: one level per sequence."""
    sequences = [tuple(range(length)) for length in range(1, 400)]
    tree = build_tree(sequences)
    assert tree.num_unique_tokens == 399
    assert tree.num_levels == 399
    assert build_tree(sequences, min_shared_tokens=100).num_levels <= 4


@pytest.mark.parametrize(
    ("sequences", "arguments", "message"),
    [
        ([], {}, "at least one sequence"),
        ([(1,), ()], {}, "sequence 1 has no tokens"),
        ([(1,)], {"min_shared_tokens": 0}, "min_shared_tokens must be at least 1; got 0"),
        ([(1,)], {"max_depth": -1}, "max_depth must be None or at least 0; got -1"),
    ],
)
def test_bad_arguments(sequences: list[tuple[int, ...]], arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tree(sequences, **arguments)


def test_unshared_tree_refuses_the_same() -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        build_unshared_tree([])


@given(token_lists, st.data())
def test_cut_segments_hold_the_same_sequences(sequences: list[tuple[int, ...]], data: st.DataObject) -> None:
    tree = build_tree(sequences)
    long = [index for index, segment in enumerate(tree.segments) if len(segment) > 1]
    offsets = {
        index: data.draw(st.integers(1, len(tree.segments[index]) - 1)) for index in long if data.draw(st.booleans())
    }
    cut = cut_segments(tree, offsets)
    check_structure(cut)
    assert [cut.sequence(index) for index in range(len(sequences))] == sequences
    assert len(cut.segments) == len(tree.segments) + len(offsets)
    starts = {(segment.start, segment.input_ids) for segment in cut.segments}
    for index, segment in enumerate(tree.segments):
        if index in offsets:
            end = offsets[index]
            assert {(segment.start, segment.input_ids[:end]), (segment.start + end, segment.input_ids[end:])} <= starts
        else:
            assert (segment.start, segment.input_ids) in starts
