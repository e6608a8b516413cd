"""The level layout: rows, positions, blocks and predictors, each checked against the tree by brute force."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from token_lists import scored_token_lists

from kvpref.prefix.levels import LevelLayout, VarlenLayout, build_layout, cut_prompts, prompt_segments
from kvpref.prefix.tree import PrefixTree, build_tree

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
        assert k1 > k0
        pairs |= {(q, k) for q in range(q0, q1) for k in range(k0, k1) if block.shape != "causal" or k - k0 <= q - q0}
    return pairs


def is_above(tree: PrefixTree, ancestor: int, index: int) -> bool:
    parent = tree.segments[index].parent
    return parent is not None and (parent == ancestor or is_above(tree, ancestor, parent))


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
        assert len(level.cross_blocks) == depth
        for above, block in enumerate(level.cross_blocks):
            assert block.shape == "rectangle"
            assert block.source == above + 1
            assert block.cu_seqlens_q[-1] == len(rows)
            assert block.cu_seqlens_k[-1] == len(rows_of(tree, above))
            assert visible_pairs(block) == {
                (q, k)
                for q, (index_q, _) in enumerate(rows)
                for k, (index_k, _) in enumerate(rows_of(tree, above))
                if is_above(tree, index_k, index_q)
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
        for path, flags in zip(tree.paths, scored[1], strict=True)
        for segment in path
        for position in range(tree.segments[segment].start, tree.segments[segment].start + len(tree.segments[segment]))
        if flags[position]
    }
    assert num_unique == len(wanted)


@given(scored_token_lists(), limits, st.permutations(range(3)))
def test_layout_does_not_depend_on_token_values(
    scored: Scored, limit: tuple[int, int | None], names: list[int]
) -> None:
    renamed = [tuple(names[token] for token in ids) for ids in scored[0]]
    first, second = lay_out(scored, limit)[1], lay_out((renamed, scored[1]), limit)[1]
    assert first.token_index == second.token_index
    for one, other in zip(first.levels, second.levels, strict=True):
        assert one.predictor_rows == other.predictor_rows
        assert one.position_ids == other.position_ids
        assert one.cross_blocks == other.cross_blocks
        assert one.self_block == other.self_block


def test_first_tokens_of_several_responses_each_get_the_prompts_last_row() -> None:
    tree = build_tree([(1, 2, 3), (1, 2, 4), (1, 2, 3)])
    layout = build_layout(tree, [(False, False, True)] * 3)
    assert layout.levels[0].predictor_rows == (1, 1)
    assert layout.levels[0].targets == (3, 4)
    assert layout.levels[1].predictor_rows == ()
    assert layout.token_index == (0, 1, 0)
    assert layout.levels[1].position_ids == (2, 2)


@given(scored_token_lists(), limits)
def test_prompts_end_where_a_segment_ends(scored: Scored, limit: tuple[int, int | None]) -> None:
    """After the cut, a token is in a prompt's segment exactly if no sequence scores it, or one before it."""
    tree = build_tree(scored[0], min_shared_tokens=limit[0], max_depth=limit[1])
    cut = cut_prompts(tree, scored[1])
    assert [cut.sequence(index) for index in range(len(scored[0]))] == scored[0]
    assert cut.num_unique_tokens == tree.num_unique_tokens
    prompts = prompt_segments(cut, scored[1])
    paths = list(zip(cut.paths, scored[1], strict=True))
    for index, segment in enumerate(cut.segments):
        through = [flags for path, flags in paths if index in path]
        for position in range(segment.start, segment.start + len(segment)):
            assert (index in prompts) == (not any(any(flags[: position + 1]) for flags in through))
