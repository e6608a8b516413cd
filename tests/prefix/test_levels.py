"""The level layout: rows, positions, blocks and predictors, each checked against the tree by brute force."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from token_lists import scored_token_lists

from kvpref.prefix.blocks import VarlenLayout
from kvpref.prefix.building import build_tree
from kvpref.prefix.levels import Level, LevelLayout, build_layout, cut_prompts, prompt_segments
from kvpref.prefix.tree import PrefixTree

Scored = tuple[list[tuple[int, ...]], list[tuple[bool, ...]]]
limits = st.tuples(st.integers(1, 3), st.one_of(st.none(), st.integers(0, 3)))


def lay_out(scored: Scored, limit: tuple[int, int | None]) -> tuple[PrefixTree, LevelLayout]:
    tree = build_tree(scored[0], min_shared_tokens=limit[0], max_depth=limit[1])
    return tree, build_layout(tree, scored[1])


def rows_of(tree: PrefixTree, depth: int) -> list[tuple[int, int]]:
    """Per row of a level, its (segment, offset)."""
    return [
        (index, offset)
        for index, segment in enumerate(tree.segments)
        if segment.depth == depth
        for offset in range(len(segment))
    ]


def visible_pairs(block: VarlenLayout) -> set[tuple[int, int]]:
    """All (query row, key row) that a block connects."""
    assert len(block.cu_seqlens_q) == len(block.cu_seqlens_k)
    assert block.cu_seqlens_q[0] == block.cu_seqlens_k[0] == 0
    pairs = set()
    for (q0, q1), (k0, k1) in zip(pairwise(block.cu_seqlens_q), pairwise(block.cu_seqlens_k), strict=True):
        assert q1 >= q0
        assert k1 >= k0
        assert not pairs & {(q, k) for q in range(q0, q1) for k in range(k0, k1)}
        pairs |= {(q, k) for q in range(q0, q1) for k in range(k0, k1) if block.shape != "causal" or k - k0 <= q - q0}
    return pairs


def sum_pairs(level: Level) -> set[tuple[int, int]]:
    return set().union(*map(visible_pairs, level.cross_blocks))


def num_seen(tree: PrefixTree, ancestor: int, index: int) -> int:
    """How many tokens of an ancestor a segment sees; 0 of others."""
    segment = tree.segments[index]
    if segment.parent is None:
        return 0
    if segment.parent == ancestor:
        return segment.start - tree.segments[ancestor].start
    return num_seen(tree, ancestor, segment.parent)


@given(scored_token_lists(), limits)
def test_rows_hold_the_tokens_and_positions_of_their_segments(scored: Scored, limit: tuple[int, int | None]) -> None:
    tree, layout = lay_out(scored, limit)
    assert len(layout.levels) == tree.num_levels
    for depth, level in enumerate(layout.levels):
        rows = rows_of(tree, depth)
        assert list(level.input_ids) == [tree.segments[index].input_ids[offset] for index, offset in rows]
        assert list(level.position_ids) == [tree.segments[index].start + offset for index, offset in rows]
    assert layout.max_position == max(map(len, scored[0])) - 1


@given(scored_token_lists(), limits)
def test_blocks_connect_every_token_with_exactly_its_path(scored: Scored, limit: tuple[int, int | None]) -> None:
    tree, layout = lay_out(scored, limit)
    for depth, level in enumerate(layout.levels):
        rows = rows_of(tree, depth)
        assert level.self_block.shape == "causal"
        assert visible_pairs(level.self_block) == {
            (q, k)
            for q, (index_q, offset_q) in enumerate(rows)
            for k, (index_k, offset_k) in enumerate(rows)
            if index_q == index_k and offset_k <= offset_q
        }
        seen: dict[int, set[tuple[int, int]]] = {above: set() for above in range(depth)}
        for block, positions in zip(level.cross_blocks, level.key_positions, strict=True):
            assert block.shape == "rectangle"
            assert block.cu_seqlens_q[-1] == len(rows)
            assert block.key_starts is None, "kernels take ranges that do not overlap"
            above = rows_of(tree, block.source - 1)
            assert block.cu_seqlens_k[-1] == len(above)
            for first, stop, position in zip(block.cu_seqlens_k, block.cu_seqlens_k[1:], positions, strict=False):
                segment, offset = above[first] if first < stop else (0, 0)
                assert position == tree.segments[segment].start + offset
            assert not seen[block.source - 1] & visible_pairs(block), "each pair is in one block"
            seen[block.source - 1] |= visible_pairs(block)
        for above, pairs in seen.items():
            assert pairs == {
                (q, k)
                for q, (index_q, _) in enumerate(rows)
                for k, (index_k, offset_k) in enumerate(rows_of(tree, above))
                if offset_k < num_seen(tree, index_k, index_q)
            }


@given(scored_token_lists(), limits)
def test_each_scored_token_is_predicted_by_the_row_before_it(scored: Scored, limit: tuple[int, int | None]) -> None:
    tree, layout = lay_out(scored, limit)
    predictors = [
        (rows_of(tree, depth)[row], target)
        for depth, level in enumerate(layout.levels)
        for row, target in zip(level.predictor_rows, level.targets, strict=True)
    ]
    assert len(layout.cu_seqlens) == len(scored[0]) + 1
    for index, (ids, flags) in enumerate(zip(*scored, strict=True)):
        slots = layout.token_index[layout.cu_seqlens[index] : layout.cu_seqlens[index + 1]]
        positions = [position for position, flag in enumerate(flags) if flag]
        assert len(slots) == len(positions)
        for slot, position in zip(slots, positions, strict=True):
            (segment, offset), target = predictors[slot]
            assert target == ids[position]
            assert segment in tree.paths[index]
            assert tree.segments[segment].start + offset == position - 1
            assert tree.segments[segment].input_ids[offset] == ids[position - 1]


@given(scored_token_lists(), limits)
def test_every_scored_token_is_computed_once_and_nothing_else(scored: Scored, limit: tuple[int, int | None]) -> None:
    tree, layout = lay_out(scored, limit)
    num_unique = sum(len(level.targets) for level in layout.levels)
    assert set(layout.token_index) == set(range(num_unique))
    wanted = {
        (segment, position)
        for index, flags in enumerate(scored[1])
        for segment, start, stop in tree.steps(index)
        for position in range(start, stop)
        if flags[position]
    }
    assert num_unique == len(wanted)


@given(scored_token_lists(), limits, st.permutations(range(3)))
def test_layout_does_not_depend_on_token_values(
    scored: Scored, limit: tuple[int, int | None], names: list[int]
) -> None:
    renamed = [tuple(names[token] for token in ids) for ids in scored[0]]
    first, second = lay_out(scored, limit)[1], lay_out((renamed, scored[1]), limit)[1]
    assert first.token_index.tolist() == second.token_index.tolist()
    for one, other in zip(first.levels, second.levels, strict=True):
        assert one.predictor_rows.tolist() == other.predictor_rows.tolist()
        assert one.position_ids.tolist() == other.position_ids.tolist()
        assert one.cross_blocks == other.cross_blocks
        assert one.self_block == other.self_block


def test_first_tokens_of_several_responses_each_get_the_prompts_last_row() -> None:
    tree = build_tree([(1, 2, 3), (1, 2, 4), (1, 2, 3)])
    layout = build_layout(tree, [(False, False, True)] * 3)
    assert layout.levels[0].predictor_rows.tolist() == [1, 1]
    assert layout.levels[0].targets.tolist() == [3, 4]
    assert layout.levels[1].predictor_rows.tolist() == []
    assert layout.token_index.tolist() == [0, 1, 0]
    assert layout.levels[1].position_ids.tolist() == [2, 2]


def test_segments_that_branch_off_one_run_take_few_blocks() -> None:
    """Thirty places of one run, each with a segment of its own: the digits of 30."""
    trunk = tuple(range(400))
    tree = build_tree([trunk, *((*trunk[: 10 * turn], 1000 + turn) for turn in range(1, 31))])
    level = build_layout(tree, [(False,) * len(ids) for ids in tree.sequences]).levels[1]
    assert len(level.cross_blocks) == 5
    seen = [len({k for q, k in map(tuple, pairs) if q == row}) for pairs in [sum_pairs(level)] for row in range(30)]
    assert seen == [10 * turn for turn in range(1, 31)]


@given(scored_token_lists(), limits)
def test_prompts_end_where_a_segment_ends(scored: Scored, limit: tuple[int, int | None]) -> None:
    """After the cut, a token is in a prompt's segment exactly if no sequence scores it, or one before it."""
    tree = build_tree(scored[0], min_shared_tokens=limit[0], max_depth=limit[1])
    cut = cut_prompts(tree, scored[1])
    assert [cut.sequence(index) for index in range(len(scored[0]))] == scored[0]
    assert cut.num_unique_tokens == tree.num_unique_tokens
    prompts = prompt_segments(cut, scored[1])
    steps = [(*step, flags) for number, flags in enumerate(scored[1]) for step in cut.steps(number)]
    for index, segment in enumerate(cut.segments):
        for position in range(segment.start, segment.start + len(segment)):
            through = [flags for own, _, stop, flags in steps if own == index and position < stop]
            assert (index in prompts) == (not any(any(flags[: position + 1]) for flags in through))
