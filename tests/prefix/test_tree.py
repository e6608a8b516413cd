"""The prefix tree: every sequence comes back, nothing is stored twice, limits hold at the least cost."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_lists import token_lists

from kvpref.prefix.building import build_tree, build_unshared_tree, cut_segments
from kvpref.prefix.radix import shared_prefix_length
from kvpref.prefix.tree import PrefixTree

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
            assert parent.start < segment.start <= parent.start + len(parent)
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
    firsts = [(segment.parent, segment.start, segment.input_ids[0]) for segment in tree.segments]
    assert len(set(firsts)) == len(firsts)


@given(token_lists, limits)
def test_limits_are_respected(sequences: list[tuple[int, ...]], limit: tuple[int, int | None]) -> None:
    min_shared_tokens, max_depth = limit
    tree = build_tree(sequences, min_shared_tokens=min_shared_tokens, max_depth=max_depth)
    children = [segment for segment in tree.segments if segment.parent is not None]
    assert all(child.start - tree.segments[child.parent].start >= min_shared_tokens for child in children)
    assert max_depth is None or tree.num_levels <= max_depth + 1


@given(token_lists)
def test_levels_are_few_however_often_sequences_part(sequences: list[tuple[int, ...]]) -> None:
    """Without a segment of the same length below, each level at least doubles what is needed for it."""
    assert 2 ** (build_tree(sequences).num_levels - 1) <= len(set(sequences))


@given(token_lists, limits)
def test_without_branches_inside_every_segment_starts_where_its_parent_ends(
    sequences: list[tuple[int, ...]], limit: tuple[int, int | None]
) -> None:
    tree = build_tree(sequences, min_shared_tokens=limit[0], max_depth=limit[1], branches_inside=False)
    check_structure(tree)
    assert [tree.sequence(index) for index in range(len(sequences))] == sequences
    for segment in tree.segments:
        if segment.parent is not None:
            parent = tree.segments[segment.parent]
            assert segment.start == parent.start + len(parent)


@given(token_lists, st.integers(0, 6))
def test_a_level_more_saves_what_it_has_to(sequences: list[tuple[int, ...]], pass_tokens: int) -> None:
    tree = build_tree(sequences, pass_tokens=pass_tokens)
    fewest = [build_tree(sequences, max_depth=depth).num_unique_tokens for depth in range(len(sequences))]
    costs = [tokens + max(0, depth - 1) * pass_tokens for depth, tokens in enumerate(fewest)]
    assert tree.num_unique_tokens + max(0, tree.num_levels - 2) * pass_tokens == min(costs)


def test_a_comb_runs_in_two_levels() -> None:
    """Thirty turns, each answered once more with thinking that later turns do not see."""
    trunk = tuple(range(300))
    sequences = [trunk, *((*trunk[: 10 * turn], 1000 + turn, 2000) for turn in range(1, 30))]
    tree = build_tree(sequences, min_shared_tokens=5)
    assert tree.num_levels == 2
    assert tree.num_unique_tokens == trie_size(sequences)
    assert build_tree(sequences, branches_inside=False).num_levels == 30


@given(token_lists, limits)
def test_descendants_are_contiguous_in_depth_first_order(
    sequences: list[tuple[int, ...]], limit: tuple[int, int | None]
) -> None:
    tree = build_tree(sequences, min_shared_tokens=limit[0], max_depth=limit[1])
    for index in range(len(tree.segments)):
        below = [other for other in range(len(tree.segments)) if index in ancestors(tree, other)]
        assert below == list(range(index + 1, index + 1 + len(below)))


Limit = tuple[int, int | None]


def cheapest(sequences: frozenset[tuple[int, ...]], start: int, depth: int, limit: Limit, inside: bool) -> int:
    """Fewest tokens for distinct sequences that agree up to `start`, by trying every way to cut and to group them.

    A sequence that another one begins with costs nothing. A branch may be at any offset here, and what shares a first
    token may still be stored apart, so the search is not built on the radix tree's nodes.
    """
    total = 0
    rest = [ids for ids in sequences if len(ids) > start]
    for _, same_first in itertools.groupby(sorted(rest), key=lambda ids: ids[start]):
        total += _cheapest_bundle(frozenset(same_first), start, depth, limit, inside)
    return total


@cache
def _cheapest_bundle(bundle: frozenset[tuple[int, ...]], start: int, depth: int, limit: Limit, inside: bool) -> int:
    best = sum(len(ids) - start for ids in bundle)
    min_shared_tokens, max_depth = limit
    if max_depth is not None and depth >= max_depth:
        return best
    for host in bundle:
        # Where each other sequence branches off the host: nowhere, or behind enough shared tokens.
        others = sorted(bundle - {host})
        places = [[None, *range(start + min_shared_tokens, shared_prefix_length(host, other) + 1)] for other in others]
        for chosen in itertools.product(*places):
            if not any(chosen) or (not inside and len({place for place in chosen if place}) > 1):
                continue
            cost = len(host) - start
            for place in {place for place in chosen if place}:
                below = frozenset(ids for ids, own in zip(others, chosen, strict=True) if own == place)
                cost += cheapest(below if inside else below | {host}, place, depth + 1, limit, inside)
                cost -= 0 if inside else len(host) - place
            apart = frozenset(ids for ids, own in zip(others, chosen, strict=True) if own is None)
            if apart:
                cost += _cheapest_bundle(apart, start, depth, limit, inside)
            best = min(best, cost)
    return best


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple), min_size=1, max_size=5),
    limits,
    st.booleans(),
)
def test_no_other_choice_of_segments_stores_fewer_tokens(
    sequences: list[tuple[int, ...]], limit: Limit, inside: bool
) -> None:
    tree = build_tree(sequences, min_shared_tokens=limit[0], max_depth=limit[1], branches_inside=inside)
    longest = frozenset(
        ids for ids in sequences if not any(other[: len(ids)] == ids and len(other) > len(ids) for other in sequences)
    )
    assert tree.num_unique_tokens == cheapest(longest, 0, 0, limit, inside)


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
    """Siblings that branch off together are ordered by the first sequence that they serve: groups stay together."""
    tree = build_tree(sequences)
    first_use = [min(i for i, path in enumerate(tree.paths) if index in path) for index in range(len(tree.segments))]
    for parent in {segment.parent for segment in tree.segments}:
        children = [index for index, segment in enumerate(tree.segments) if segment.parent == parent]
        assert children == sorted(children, key=lambda index: (tree.segments[index].start, first_use[index]))


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
    rows = [(1, *[row] * 4, end) for row in (2, 3) for end in (5, 6)]
    by_depth = build_tree(rows, max_depth=1, branches_inside=False)
    assert [segment.input_ids for segment in by_depth.segments[:1]] == [(1, 2, 2, 2, 2)]
    assert by_depth.num_unique_tokens == 2 * 5 + 4
    rows = [*((1, 1, 1, 2, 2, end) for end in range(5)), (1, 1, 1, 3)]
    by_length = build_tree(rows, min_shared_tokens=3, branches_inside=False)
    assert by_length.segments[0].input_ids == (1, 1, 1, 2, 2)
    assert by_length.num_unique_tokens == 5 + 5 + 4


def test_a_sequence_that_is_a_prefix_of_another_ends_inside_the_tree() -> None:
    tree = build_tree([(1, 2), (1, 2, 3)], max_depth=0)
    assert tree.paths == ((0,), (0,))
    assert [segment.input_ids for segment in tree.segments] == [(1, 2, 3)]
    assert tree.path_stops.tolist() == [2, 3]
    assert tree.sequence(0) == (1, 2)


def test_a_chain_of_turns_is_one_segment() -> None:
    """Each sequence a prefix of the next, as the calls of one trajectory are."""
    sequences = [tuple(range(length)) for length in range(1, 400)]
    tree = build_tree(sequences, branches_inside=False)
    assert (tree.num_unique_tokens, tree.num_segments) == (399, 1)


def test_deep_trees_do_not_exhaust_the_stack() -> None:
    sequences = [(*range(length), -1 - length) for length in range(1, 400)]
    assert build_tree(sequences).num_levels == 2
    assert build_tree(sequences, branches_inside=False).num_levels == 399


@pytest.mark.parametrize(
    ("sequences", "arguments", "message"),
    [
        ([], {}, "at least one sequence"),
        ([(1,), ()], {}, "sequence 1 has no tokens"),
        ([(1,)], {"min_shared_tokens": 0}, "min_shared_tokens must be at least 1; got 0"),
        ([(1,)], {"max_depth": -1}, "max_depth must be None or at least 0; got -1"),
        ([(1,)], {"pass_tokens": -1}, "pass_tokens must be at least 0; got -1"),
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
        index: sorted(data.draw(st.sets(st.integers(1, len(tree.segments[index]) - 1), min_size=1, max_size=3)))
        for index in long
        if data.draw(st.booleans())
    }
    cut = cut_segments(tree, offsets)
    check_structure(cut)
    assert [cut.sequence(index) for index in range(len(sequences))] == sequences
    assert len(cut.segments) == len(tree.segments) + sum(map(len, offsets.values()))
    starts = {(segment.start, segment.input_ids) for segment in cut.segments}
    for index, segment in enumerate(tree.segments):
        for start, stop in itertools.pairwise([0, *offsets.get(index, ()), len(segment)]):
            assert (segment.start + start, segment.input_ids[start:stop]) in starts
