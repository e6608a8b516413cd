"""Spans that see both ways: every token of random trees, cut in all ways, sees what the mask of its sequence says."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from unique_tokens import with_unique_tokens

from kvpref.prefix.blocks import PlacedBlocks
from kvpref.prefix.both_ways import cut, segment_runs
from kvpref.prefix.building import build_tree
from kvpref.prefix.chunks import build_chunks
from kvpref.prefix.levels import build_layout
from kvpref.prefix.rules import Rule
from kvpref.prefix.runs import Runs, joined
from kvpref.prefix.shapes import blocks_under
from kvpref.prefix.slab_reads import SHARED, SlabKey
from kvpref.prefix.tree import PrefixTree

CAUSAL = Rule("causal", bidirectional=True)
Token = tuple[int, int]
"""Segment and offset."""


def rules(generator: random.Random) -> list[Rule]:
    size = generator.choice((1, 2, 3, 4, 6, 9, 50))
    return [
        CAUSAL,
        Rule("window", size, bidirectional=True),
        Rule("window", size, bidirectional=True, whole_spans=True),
        Rule("causal"),
    ]


def meet(rule: Rule, runs: Runs, query: int, key: int) -> bool:
    """The mask as models write it: AND(window, OR(causal, same image)), or OR(AND(window, causal), same prompt)."""
    same = rule.bidirectional and any(first <= query < stop and first <= key < stop for first, stop in runs)
    near = rule.kind == "causal" or query - key < rule.size
    return (near and key <= query) or same if rule.whole_spans else near and (key <= query or same)


@dataclass
class Case:
    """A random tree over sequences with images of several lengths between texts."""

    tree: PrefixTree
    spans: list[Runs]
    scored: list[list[bool]]
    owners: list[int]

    def seen(self, rule: Rule) -> dict[Token, set[Token]]:
        """What each token of the tree sees, by each sequence that holds it."""
        found: dict[Token, set[Token]] = {}
        for number, runs in enumerate(self.spans):
            steps = self.tree.steps(number)
            tokens = [(index, offset) for index, start, stop in steps for offset in range(stop - start)]
            for query, token in enumerate(tokens):
                own = {tokens[key] for key in range(len(tokens)) if meet(rule, runs, query, key)}
                assert found.setdefault(token, own) == own
        return found


def random_case(generator: random.Random) -> Case:
    sequences, spans, scored = [], [], []
    prompts = [list(_parts(generator)) for _ in range(2)]
    for _ in range(generator.randint(1, 6)):
        prompt = generator.choice(prompts)
        parts = [*prompt[: generator.randint(1, len(prompt))], *_parts(generator)]
        tokens: list[int] = []
        runs: list[tuple[int, int]] = []
        for part in parts:
            if part[0] >= 100:
                runs.append((len(tokens), len(tokens) + len(part)))
            tokens.extend(part)
        sequences.append(tuple(tokens))
        spans.append(tuple(runs))
        scored.append([False] * (len(tokens) - 1) + [True])
    shared, depth = generator.choice((1, 1, 3)), generator.choice((None, None, 1))
    tree = build_tree(sequences, min_shared_tokens=shared, max_depth=depth)
    return Case(tree, spans, scored, sorted(generator.randrange(2) for _ in sequences))


def _parts(generator: random.Random) -> Iterator[tuple[int, ...]]:
    """Text, an image, text and so on; the tokens of an image are its own."""
    for _ in range(generator.randint(1, 2)):
        yield tuple(generator.randrange(3) for _ in range(generator.randint(1, 4)))
        if generator.random() < 0.7:
            key = generator.randrange(1, 5)
            yield tuple(100 * key + offset for offset in range(1 + 2 * key))
    yield tuple(generator.randrange(3) for _ in range(generator.randint(1, 3)))


def pairs_of(placed: PlacedBlocks, rule: Rule, sources: list[list[Token]]) -> list[tuple[Token, Token]]:
    """Query and key of every pair that the blocks hold; `sources` are their own rows and those of each prefix."""
    found = []
    for block in blocks_under(placed, rule):
        starts = block.cu_seqlens_k[:-1] if block.key_starts is None else block.key_starts
        ranges = zip(pairwise(block.cu_seqlens_q), pairwise(block.cu_seqlens_k), starts, strict=True)
        for (q0, q1), (k0, k1), start in ranges:
            for i in range(q1 - q0):
                for j in range(k1 - k0):
                    seen = {"rectangle": True, "causal": j <= i, "anti_causal": j >= i}[block.shape]
                    if seen and (block.window is None or i - j < block.window):
                        found.append((sources[0][q0 + i], sources[block.source][start + j]))
    return found


def assert_sees(pairs: list[tuple[Token, Token]], expected: dict[Token, set[Token]], note: object) -> None:
    counts = Counter(pairs)
    assert counts == dict.fromkeys(((query, key) for query, keys in expected.items() for key in keys), 1), note


def test_tokens_of_levels_see_both_ways_inside_spans() -> None:
    num_spans = 0
    for seed in range(150):
        generator = random.Random(seed)
        case = random_case(generator)
        layout = build_layout(case.tree, case.scored, case.spans)
        num_spans += sum(len(level.spans) for level in layout.levels)
        rows = [
            [(index, offset) for index in level.segments for offset in range(len(case.tree.segments[index]))]
            for level in layout.levels
        ]
        for rule in rules(generator):
            found = []
            for depth, level in enumerate(layout.levels):
                found.extend(pairs_of(level.placed, rule, [rows[depth], *rows[:depth]]))
            assert_sees(found, case.seen(rule), (seed, rule))
    assert num_spans > 150


def test_tokens_of_chunks_see_both_ways_inside_spans_which_are_never_cut() -> None:
    for seed in range(150):
        generator = random.Random(1000 + seed)
        case = random_case(generator)
        case.tree = with_unique_tokens(case.tree, stride=1000)
        layout = build_layout(case.tree, case.scored, case.spans)
        limit = generator.choice((1, 2, 3, 4, 5, 6, 8, 12, None))
        chunks = build_chunks(
            case.tree,
            layout,
            case.owners,
            max_tokens=limit,
            scored=case.scored if generator.random() < 0.5 else None,
            spans=case.spans,
        )
        in_order = [chunk for owner in (SHARED, 0, 1) for chunk in chunks.chunks.get(owner, ())]
        for chunk in in_order:
            longest = max((stop - first for first, stop in chunk.spans), default=0)
            assert limit is None or len(chunk) <= limit or len(chunk) == longest, (seed, limit)
        tokens = [[divmod(token, 1000) for token in chunk.input_ids.tolist()] for chunk in in_order]
        for rule in rules(generator):
            slabs: dict[tuple[SlabKey, int], Token] = {}
            found = []
            for chunk, rows in zip(in_order, tokens, strict=True):
                before = [[slabs[read.slab, row] for row in range(read.start, read.stop)] for read in chunk.reads]
                found.extend(pairs_of(chunk.placed, rule, [rows, *before]))
                if chunk.slab_start is not None:
                    slabs.update({(chunk.slab, chunk.slab_start + row): token for row, token in enumerate(rows)})
            assert_sees(found, case.seen(rule), (seed, rule))


def test_a_span_must_stand_in_one_segment() -> None:
    tree = build_tree([(1, 2, 3, 4), (1, 2, 5, 6)])
    with pytest.raises(ValueError, match="must stand in one segment"):
        segment_runs(tree, [((1, 3),), ()])
    with pytest.raises(ValueError, match="in one sequence and"):
        segment_runs(tree, [((0, 2),), ()])
    assert segment_runs(tree, [((0, 2),), ((0, 2), (2, 4))]) == [((0, 2),), (), ((0, 2),)]
    assert segment_runs(tree, None) == [(), (), ()]


def test_neighbouring_runs_are_one() -> None:
    assert joined([(1, 3), (3, 4), (6, 7), (7, 9)]) == ((1, 4), (6, 9))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (4, [(0, 3), (3, 10), (10, 12)]),  # a span longer than the limit is a piece of its own
        (1, [(0, 1), (1, 2), (2, 3), (3, 10), (10, 11), (11, 12)]),
        (5, [(0, 3), (3, 10), (10, 12)]),
        (10, [(0, 10), (10, 12)]),
        (12, [(0, 12)]),
    ],
)
def test_pieces_end_before_a_span_that_does_not_fit(limit: int, expected: list[tuple[int, int]]) -> None:
    assert list(cut(12, limit, ((3, 10),))) == expected


def test_a_segment_that_is_one_span_leaves_no_keys_for_itself() -> None:
    tree = build_tree([(1, 2, 3, 4, 5, 6)])
    layout = build_layout(tree, [[False] * 6], [((0, 6),)])
    chunks = build_chunks(tree, layout, [0], max_tokens=2, spans=[((0, 6),)])
    (chunk,) = chunks.chunks[0]
    assert len(chunk) == 6
    assert chunk.slab_start is None
    assert not chunks.slab_rows


def test_rules_that_say_nothing_are_refused() -> None:
    for kind, size in (("chunk", 4), ("dense", 0)):
        with pytest.raises(ValueError, match="cannot see later"):
            Rule(kind, size, (((0, 1),),) if kind == "dense" else (), bidirectional=True)
    with pytest.raises(ValueError, match="seen whole"):
        replace(CAUSAL, whole_spans=True)
    assert str(Rule("window", 8, bidirectional=True)) == "window of 8, both ways inside images"
