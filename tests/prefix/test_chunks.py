"""Chunks: bounded, complete, in an order that can run, and every token sees exactly its path; by brute force."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_lists import scored_token_lists
from unique_tokens import seen_by, with_unique_tokens

from kvpref.prefix.blocks import VarlenLayout
from kvpref.prefix.building import build_tree
from kvpref.prefix.chunks import Chunk, ChunkLayout, build_chunks
from kvpref.prefix.levels import LevelLayout, build_layout
from kvpref.prefix.slab_reads import SHARED, SlabKey
from kvpref.prefix.tree import PrefixTree


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A random tree, cut. Every token has an id of its own, so that chunks tell which tokens they run."""

    tree: PrefixTree
    layout: LevelLayout
    chunks: ChunkLayout
    owners: list[int]
    max_tokens: int | None
    prompts: set[int]
    """Segments that are to have chunks of their own."""

    def place(self, token: int) -> tuple[int, int]:
        """The (segment, offset) of a token."""
        starts = list(accumulate(map(len, self.tree.segments), initial=0))
        segment = max(index for index, start in enumerate(starts[:-1]) if start <= token)
        return segment, token - starts[segment]

    def path(self, token: int) -> set[int]:
        """The tokens that a token attends to."""
        index, offset = self.place(token)
        seen = set(self.tree.segments[index].input_ids[: offset + 1])
        for above, num_seen in seen_by(self.tree, index).items():
            seen |= set(self.tree.segments[above].input_ids[:num_seen])
        return seen

    def in_order(self) -> Iterator[tuple[int, Chunk]]:
        """Every chunk with its owner, as the engine runs them."""
        for owner in (SHARED, *sorted(set(self.owners))):
            for chunk in self.chunks.chunks.get(owner, ()):
                yield owner, chunk

    def chunks_of(self, segment: int) -> list[Chunk]:
        tokens = set(self.tree.segments[segment].input_ids)
        return [chunk for _, chunk in self.in_order() if tokens & set(chunk.input_ids.tolist())]


def prompts_of(tree: PrefixTree, scored: list[tuple[bool, ...]]) -> set[int]:
    """Segments up to whose end, or where they leave it, none of their sequences scores a token."""
    responses = {
        index for number, flags in enumerate(scored) for index, _, stop in tree.steps(number) if any(flags[:stop])
    }
    return set(range(len(tree.segments))) - responses


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    lists, flags = draw(scored_token_lists())
    shared, depth = draw(st.integers(1, 3)), draw(st.one_of(st.none(), st.integers(0, 3)))
    tree = with_unique_tokens(build_tree(lists, min_shared_tokens=shared, max_depth=depth))
    owners = draw(st.lists(st.integers(0, 2), min_size=len(lists), max_size=len(lists)))
    max_tokens = draw(st.one_of(st.none(), st.integers(1, 8)))
    layout = build_layout(tree, flags)
    apart = draw(st.booleans())
    chunks = build_chunks(tree, layout, owners, max_tokens=max_tokens, scored=flags if apart else None)
    return Cut(
        tree=tree,
        layout=layout,
        chunks=chunks,
        owners=owners,
        max_tokens=max_tokens,
        prompts=prompts_of(tree, flags) if apart else set(),
    )


def visible_pairs(block: VarlenLayout) -> Iterator[tuple[int, int]]:
    """All (query row, key row) that a block connects."""
    assert len(block.cu_seqlens_q) == len(block.cu_seqlens_k)
    for (q0, q1), (k0, k1) in zip(pairwise(block.cu_seqlens_q), pairwise(block.cu_seqlens_k), strict=True):
        yield from ((q, k) for q in range(q0, q1) for k in range(k0, k1) if block.shape != "causal" or k - k0 <= q - q0)


@given(cuts())
def test_every_token_runs_once_at_its_position_in_a_bounded_chunk(cut: Cut) -> None:
    counts = Counter(token for _, chunk in cut.in_order() for token in chunk.input_ids)
    assert counts == dict.fromkeys(range(cut.tree.num_unique_tokens), 1)
    assert sum(map(len, cut.chunks.chunks.values())) == len(list(cut.in_order()))
    for _, chunk in cut.in_order():
        assert 0 < len(chunk) <= (cut.max_tokens or cut.tree.num_unique_tokens)
        for token, position in zip(chunk.input_ids, chunk.position_ids, strict=True):
            segment, offset = cut.place(token)
            assert position == cut.tree.segments[segment].start + offset
            assert chunk.slab.depth == cut.tree.segments[segment].depth


@given(cuts())
def test_every_token_sees_exactly_its_path_and_all_of_it_was_computed_before(cut: Cut) -> None:
    """Runs the chunks with tokens in place of keys; an owner finds only what it and `SHARED` wrote."""
    slabs: dict[tuple[SlabKey, int], int] = {}
    for owner, chunk in cut.in_order():
        seen: dict[int, list[int]] = {token: [] for token in chunk.input_ids}
        for query, key in visible_pairs(chunk.self_block):
            seen[chunk.input_ids[query]].append(chunk.input_ids[key])
        for read in chunk.reads:
            assert read.slab.owner in (SHARED, owner)
            rows = range(read.start, read.stop)
            keys = [slabs[read.slab, row] for row in rows]  # KeyError: read before it was written
            for block in read.blocks:
                assert block.cu_seqlens_q[-1] == len(chunk)
                assert block.cu_seqlens_k[-1] == len(keys)
                for query, key in visible_pairs(block):
                    seen[chunk.input_ids[query]].append(keys[key])
        for token, tokens in seen.items():
            assert sorted(tokens) == sorted(cut.path(token))
        assert len({read.slab for read in chunk.reads}) == len(chunk.reads)
        if chunk.slab_start is not None:
            for row, token in enumerate(chunk.input_ids, chunk.slab_start):
                assert (chunk.slab, row) not in slabs
                slabs[chunk.slab, row] = token
    assert Counter(key for key, _ in slabs) == dict(cut.chunks.slab_rows)
    assert all(row < cut.chunks.slab_rows[key] for key, row in slabs)


@given(cuts())
def test_owners_never_mix_and_shared_is_what_several_read(cut: Cut) -> None:
    owners_of: dict[int, set[int]] = {}
    for path, owner in zip(cut.tree.paths, cut.owners, strict=True):
        for segment in path:
            owners_of.setdefault(segment, set()).add(owner)
    for owner, chunk in cut.in_order():
        assert chunk.slab.owner == owner
        for token in chunk.input_ids:
            readers = owners_of[cut.place(token)[0]]
            assert readers == {owner} if owner != SHARED else len(readers) > 1


@given(cuts())
def test_each_log_prob_has_one_place_and_the_right_row(cut: Cut) -> None:
    levels = [[i for i, s in enumerate(cut.tree.segments) if s.depth == depth] for depth in range(cut.tree.num_levels)]
    expected = [
        ([token for index in segments for token in cut.tree.segments[index].input_ids][row], target)
        for segments, level in zip(levels, cut.layout.levels, strict=True)
        for row, target in zip(level.predictor_rows, level.targets, strict=True)
    ]
    found = {
        index: (chunk.input_ids[row], target)
        for _, chunk in cut.in_order()
        for row, target, index in zip(chunk.predictor_rows, chunk.targets, chunk.logp_index, strict=True)
    }
    assert sum(len(chunk.logp_index) for _, chunk in cut.in_order()) == len(expected)
    assert found == dict(enumerate(expected))


@given(cuts())
def test_kept_is_what_others_read_and_only_long_segments_are_cut(cut: Cut) -> None:
    limit = cut.max_tokens or cut.tree.num_unique_tokens
    parents = {segment.parent for segment in cut.tree.segments}
    for index, segment in enumerate(cut.tree.segments):
        pieces = cut.chunks_of(index)
        assert len(pieces) == -(-len(segment) // limit)
        for chunk in pieces:
            assert (chunk.slab_start is not None) == (index in parents or len(segment) > limit)
            assert chunk.slab.is_prompt == (index in cut.prompts)


@given(cuts())
def test_chunks_are_filled(cut: Cut) -> None:
    """What begins a chunk did not fit into the one before, of the same slab and use."""
    limit = cut.max_tokens or cut.tree.num_unique_tokens
    for (_, first), (_, second) in pairwise(cut.in_order()):
        if first.slab == second.slab and (first.slab_start is None) == (second.slab_start is None):
            begins = second.self_block.cu_seqlens_q[1]
            assert len(first) + begins > limit


@pytest.mark.parametrize(("max_tokens", "sizes"), [(None, [3, 4]), (3, [3, 2, 2]), (2, [2, 1, 2, 2]), (1, [1] * 7)])
def test_a_prompt_and_its_two_responses(max_tokens: int | None, sizes: list[int]) -> None:
    tree = build_tree([(1, 2, 3, 4, 5), (1, 2, 3, 6, 7)])
    layout = build_layout(tree, [(False, False, False, True, True)] * 2)
    cut = build_chunks(tree, layout, [0, 0], max_tokens=max_tokens)
    assert [len(chunk) for chunk in cut.chunks[0]] == sizes
    assert SHARED not in cut.chunks
    assert cut.slab_rows[SlabKey(owner=0, depth=0, is_prompt=False)] == 3
