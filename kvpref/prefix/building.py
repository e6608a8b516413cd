"""How a prefix tree is built from token lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from typing import Any

import numpy as np

from kvpref.prefix.choice import Limits, Part, choose_parts
from kvpref.prefix.radix import IntArray, build_radix_tree
from kvpref.prefix.tree import NO_PARENT, PrefixTree


def build_tree(
    sequences: AbstractSequence[AbstractSequence[int] | IntArray],
    *,
    min_shared_tokens: int = 1,
    max_depth: int | None = None,
    pass_tokens: int = 0,
    branches_inside: bool = True,
    keys: AbstractSequence[AbstractSequence[int] | IntArray] | None = None,
) -> PrefixTree:
    """Build the prefix tree that stores the fewest tokens under the limits, with as few levels as that allows.

    Args:
        sequences: Token ids, each at least one token long.
        min_shared_tokens: What several sequences share must hold at least this many tokens, counted from where its
            segment begins; shorter shared runs are repeated in each.
        max_depth: Depth of the deepest segment: 1 allows prompts and responses, None any depth.
        pass_tokens: Tokens that each level beyond the second has to save.
        branches_inside: Whether a segment may start inside its parent. If not, it starts at the parent's end, and a
            tree has as many levels as places where sequences part.
        keys: Per sequence, one id per token that is compared in place of the token's, where equal tokens may stand for
            different things.

    Raises:
        ValueError: If a limit is out of range, there are no sequences, or one is empty.
    """
    tokens = _as_arrays(sequences)
    limits = Limits(
        min_shared_tokens=min_shared_tokens,
        max_depth=max_depth,
        pass_tokens=pass_tokens,
        branches_inside=branches_inside,
    )
    if keys is None:
        radix = build_radix_tree(tokens)
    else:
        radix = build_radix_tree([np.asarray(key, dtype=np.int64) for key in keys], are_token_ids=False)
    parts = choose_parts(radix, list(map(len, tokens)), limits)
    return _tree_of(parts, tokens, radix.within)


def build_unshared_tree(sequences: AbstractSequence[AbstractSequence[int] | IntArray]) -> PrefixTree:
    """The tree that shares nothing: one depth-0 segment per sequence, as ordinary packing does."""
    tokens = _as_arrays(sequences)
    numbers = np.arange(len(tokens))
    zeros = np.zeros(len(tokens), dtype=np.int64)
    return PrefixTree(
        sequences=tokens,
        parents=zeros + NO_PARENT,
        depths=zeros,
        starts=zeros,
        lengths=np.array(list(map(len, tokens))),
        sources=numbers,
        path_segments=numbers,
        path_offsets=np.arange(len(tokens) + 1),
    )


def cut_segments(tree: PrefixTree, offsets: Mapping[int, AbstractSequence[int]]) -> PrefixTree:
    """The same sequences with some segments cut.

    Args:
        tree: The prefix tree.
        offsets: Segment index -> after how many of its tokens it is cut, in order; at least one and not all.
            Each piece is the parent of the next.
    """
    if not offsets:
        return tree
    roots: list[Part] = []
    parts: list[Part] = []  # per segment of `tree`, its last piece
    columns = zip(*(values.tolist() for values in (tree.parents, tree.starts, tree.ends, tree.sources)), strict=True)
    for index, (parent, start, end, source) in enumerate(columns):
        above = None if parent == NO_PARENT else parts[parent]
        while above is not None and start <= above.start:
            above = above.parent  # it starts inside an earlier piece
        stops = [*(start + offset for offset in offsets.get(index, ())), end]
        for stop in stops:
            above = Part(start, stop, source, above)
            (roots if above.parent is None else above.parent.children).append(above)
            start = stop
        assert above is not None
        parts.append(above)
    within = _leaf_holders(tree)
    return _tree_of(roots, tree.sequences, within)


def _leaf_holders(tree: PrefixTree) -> tuple[int, ...]:
    """Per sequence, a sequence that begins with it and holds all segments of its path in full."""
    last = tree.path_segments[tree.path_offsets[1:] - 1]
    return tuple(tree.sources[last].tolist())


def _as_arrays(sequences: AbstractSequence[Any]) -> tuple[IntArray, ...]:
    if not len(sequences):
        raise ValueError("a prefix tree needs at least one sequence; got none")
    for index, ids in enumerate(sequences):
        if not len(ids):
            raise ValueError(f"sequence {index} has no tokens")
    return tuple(np.asarray(ids, dtype=np.int64) for ids in sequences)


def _tree_of(roots: list[Part], tokens: tuple[IntArray, ...], within: AbstractSequence[int]) -> PrefixTree:
    """Parts as arrays, and each sequence's path, taken from the sequence in `within` that begins with it."""
    ways = {part.source: _way(part) for part in _descendants(roots) if part.end == len(tokens[part.source])}
    paths = [[part for part in ways[leaf] if part.start < len(ids)] for ids, leaf in zip(tokens, within, strict=True)]
    first: dict[Part, int] = {}
    for index, path in enumerate(paths):
        for part in path:
            first.setdefault(part, index)
    # By the first sequence, so that the layout does not depend on token values.
    parts = list(_descendants(roots, key=lambda part: (part.start, first[part])))
    places: dict[Part | None, int] = {part: index for index, part in enumerate(parts)}
    places[None] = NO_PARENT
    parents = [places[part.parent] for part in parts]
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent == NO_PARENT else depths[parent] + 1)
    return PrefixTree(
        sequences=tokens,
        parents=np.array(parents),
        depths=np.array(depths),
        starts=np.array([part.start for part in parts]),
        lengths=np.array([part.end - part.start for part in parts]),
        sources=np.array([part.source for part in parts]),
        path_segments=np.array([places[part] for path in paths for part in path]),
        path_offsets=np.cumsum([0, *map(len, paths)]),
    )


def _descendants(roots: list[Part], key: Callable[[Part], Any] | None = None) -> Iterator[Part]:
    """The parts and all below them, depth first, neighbours in the order of `key`."""
    stack = [roots]
    while stack:
        parts = stack.pop()
        if len(parts) > 1:
            ordered = parts if key is None else sorted(parts, key=key)
            stack.extend([part] for part in reversed(ordered))
        elif parts:
            yield parts[0]
            stack.append(parts[0].children)


def _way(part: Part) -> list[Part]:
    """The path from a root down to a part."""
    way = [part]
    while way[-1].parent is not None:
        way.append(way[-1].parent)
    return way[::-1]
