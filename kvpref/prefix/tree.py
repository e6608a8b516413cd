"""Prefix tree: the radix tree over the token lists of one micro-batch.

Every run of tokens that several sequences share becomes one segment, stored once. Pure Python integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from typing import NamedTuple

TokenIds = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of tokens that one or more sequences share; a node of the prefix tree.

    Attributes:
        parent: Index of the parent segment, or None at depth 0.
        depth: 0 for segments that start a sequence; a child is one deeper than its parent.
        start: Position, inside every sequence that holds it, of the segment's first token.
        input_ids: The tokens, at least one.
    """

    parent: int | None
    depth: int
    start: int
    input_ids: TokenIds

    def __len__(self) -> int:
        return len(self.input_ids)


class Span(NamedTuple):
    """The tokens [start, stop) of a segment."""

    segment: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class PrefixTree:
    """Segments in depth-first order, and each sequence's way through them.

    Attributes:
        segments: Parents stand before their children; the descendants of a segment follow it without a gap.
        paths: Per sequence, in the caller's order, the segment indices from depth 0 to its end.
    """

    segments: tuple[Segment, ...]
    paths: tuple[tuple[int, ...], ...]

    @property
    def num_unique_tokens(self) -> int:
        return sum(map(len, self.segments))

    @property
    def num_levels(self) -> int:
        return 1 + max(segment.depth for segment in self.segments)

    def end(self, index: int) -> int:
        """Position after the last token of a segment."""
        return self.segments[index].start + len(self.segments[index])

    def holders(self) -> tuple[int, ...]:
        """Per segment, the first sequence that holds it."""
        found: dict[int, int] = {}
        for number, path in enumerate(self.paths):
            for index in path:
                found.setdefault(index, number)
        return tuple(found[index] for index in range(len(self.segments)))

    def sequence(self, index: int) -> TokenIds:
        """The tokens of sequence `index`, put together again from its path."""
        return tuple(token for segment in self.paths[index] for token in self.segments[segment].input_ids)


def build_tree(
    sequences: AbstractSequence[TokenIds],
    *,
    min_shared_tokens: int = 1,
    max_depth: int | None = None,
    keys: AbstractSequence[TokenIds] | None = None,
) -> PrefixTree:
    """Build the prefix tree that stores the fewest tokens under the two limits.

    Args:
        sequences: Token ids, each at least one token long.
        min_shared_tokens: A segment with children must hold at least this many tokens; shorter shared runs are
            repeated in each child, because a pass of its own would cost more than it saves.
        max_depth: Depth of the deepest segment: 1 allows prompts and responses, None any depth.
        keys: Per sequence, one id per token that is compared in place of the token's, where equal tokens may stand for
            different things.

    Raises:
        ValueError: If a limit is out of range, there are no sequences, or one is empty.
    """
    if min_shared_tokens < 1:
        raise ValueError(f"min_shared_tokens must be at least 1; got {min_shared_tokens}")
    if max_depth is not None and max_depth < 0:
        raise ValueError(f"max_depth must be None or at least 0; got {max_depth}")
    _check_sequences(sequences)
    root = _radix_tree(sequences if keys is None else keys)
    kept = _choose_segments(root, min_shared_tokens, max_depth)
    return _emit(root, kept, sequences)


def build_unshared_tree(sequences: AbstractSequence[TokenIds]) -> PrefixTree:
    """The tree that shares nothing: one depth-0 segment per sequence, as ordinary packing does."""
    _check_sequences(sequences)
    segments = tuple(Segment(parent=None, depth=0, start=0, input_ids=ids) for ids in sequences)
    return PrefixTree(segments=segments, paths=tuple((index,) for index in range(len(segments))))


def cut_segments(tree: PrefixTree, offsets: Mapping[int, int]) -> PrefixTree:
    """The same sequences with some segments cut in two.

    Args:
        tree: The prefix tree.
        offsets: Segment index -> how many of its first tokens, at least one and not all, become a segment of their
            own, the parent of the rest.
    """
    segments: list[Segment] = []
    places: list[tuple[int, ...]] = []  # per segment of `tree`, its one or two indices in the result
    for index, segment in enumerate(tree.segments):
        stops = (offsets[index], len(segment)) if index in offsets else (len(segment),)
        parent = None if segment.parent is None else places[segment.parent][-1]
        start = 0
        for stop in stops:
            depth = 0 if parent is None else segments[parent].depth + 1
            ids = segment.input_ids[start:stop]
            segments.append(Segment(parent=parent, depth=depth, start=segment.start + start, input_ids=ids))
            parent, start = len(segments) - 1, stop
        places.append(tuple(range(len(segments) - len(stops), len(segments))))
    paths = tuple(tuple(part for index in path for part in places[index]) for path in tree.paths)
    return PrefixTree(segments=tuple(segments), paths=paths)


def shared_prefix_length(first: TokenIds, second: TokenIds) -> int:
    """Number of leading tokens that both lists share."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    # Slices compare in C, so a binary search beats a Python loop over thousands of tokens.
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _check_sequences(sequences: AbstractSequence[TokenIds]) -> None:
    if not sequences:
        raise ValueError("a prefix tree needs at least one sequence; got none")
    for index, ids in enumerate(sequences):
        if not ids:
            raise ValueError(f"sequence {index} has no tokens")


@dataclass(eq=False)
class _Node:
    """A node of the radix tree before segments are chosen: the tokens [parent.end, end) of sequence `source`."""

    parent: _Node | None
    end: int
    source: int
    children: list[_Node] = field(default_factory=list)
    ending: list[int] = field(default_factory=list)  # sequences that end exactly here

    def length_from(self, cut: _Node) -> int:
        return self.end - cut.end


def _radix_tree(sequences: AbstractSequence[TokenIds]) -> _Node:
    root = _Node(parent=None, end=0, source=0)
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    branch = [root]  # the path to the sequence before; sorted neighbours share the longest prefixes
    for position, index in enumerate(order):
        ids = sequences[index]
        shared = shared_prefix_length(sequences[order[position - 1]], ids) if position else 0
        below: _Node | None = None
        while branch[-1].end > shared:
            below = branch.pop()
        if branch[-1].end < shared:
            assert below is not None
            middle = _Node(parent=branch[-1], end=shared, source=index, children=[below])
            branch[-1].children[branch[-1].children.index(below)] = middle
            below.parent = middle
            branch.append(middle)
        if branch[-1].end < len(ids):
            leaf = _Node(parent=branch[-1], end=len(ids), source=index)
            branch[-1].children.append(leaf)
            branch.append(leaf)
        branch[-1].ending.append(index)
    _order_children(root)
    return root


def _depth_first(root: _Node) -> Iterator[_Node]:
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children))


def _order_children(root: _Node) -> None:
    """Sort children by the first sequence below them, so that the layout does not depend on token values."""
    first: dict[_Node, int] = {}
    for node in reversed(list(_depth_first(root))):
        node.ending.sort()
        first[node] = min([*node.ending, *(first[child] for child in node.children)], default=0)
        node.children.sort(key=first.__getitem__)


def _choose_segments(root: _Node, min_shared_tokens: int, max_depth: int | None) -> set[tuple[_Node, _Node]]:
    """Decide which inner nodes become segments: the choice that stores the fewest tokens.

    Dynamic programme, children first. `cost[node][cut, depth]` is the number of tokens stored below `cut`'s end on the
    way through `node`, when the nearest segment above ends at `cut` and the next segment would have this depth. An
    inner node is either kept (its run since `cut` is stored once) or dissolved (its run is repeated in each child).

    Returns:
        The pairs (node, cut) that are kept.
    """
    depths = [0] if max_depth is None else list(range(max_depth + 1))
    cost: dict[_Node, dict[tuple[_Node, int], int]] = {}
    kept: dict[tuple[_Node, _Node, int], bool] = {}
    for node in reversed(list(_depth_first(root))[1:]):
        table = cost[node] = {}
        for cut in _ancestors(node):
            run = node.length_from(cut)
            for depth in depths:
                below = depth if max_depth is None else depth + 1
                dissolved = sum(cost[child][cut, depth] for child in node.children) + (run if node.ending else 0)
                table[cut, depth] = dissolved
                if node.children and run >= min_shared_tokens and (max_depth is None or below <= max_depth):
                    whole = run + sum(cost[child][node, below] for child in node.children)
                    kept[node, cut, depth] = whole < dissolved
                    table[cut, depth] = min(whole, dissolved)
    return _follow(root, kept, step=0 if max_depth is None else 1)


def _ancestors(node: _Node) -> Iterator[_Node]:
    parent = node.parent
    while parent is not None:
        yield parent
        parent = parent.parent


def _follow(root: _Node, kept: dict[tuple[_Node, _Node, int], bool], step: int) -> set[tuple[_Node, _Node]]:
    chosen: set[tuple[_Node, _Node]] = set()
    stack = [(child, root, 0) for child in root.children]
    while stack:
        node, cut, depth = stack.pop()
        if kept.get((node, cut, depth), False):
            chosen.add((node, cut))
            cut, depth = node, depth + step
        stack.extend((child, cut, depth) for child in node.children)
    return chosen


def _emit(root: _Node, kept: set[tuple[_Node, _Node]], sequences: AbstractSequence[TokenIds]) -> PrefixTree:
    segments: list[Segment] = []
    paths: list[tuple[int, ...]] = [()] * len(sequences)
    stack: list[tuple[_Node, _Node, tuple[int, ...]]] = [(child, root, ()) for child in reversed(root.children)]
    while stack:
        node, cut, path = stack.pop()
        keep = (node, cut) in kept
        if keep or node.ending:
            here = (*path, len(segments))
            ids = sequences[node.source][cut.end : node.end]
            segments.append(Segment(parent=path[-1] if path else None, depth=len(path), start=cut.end, input_ids=ids))
            for index in node.ending:
                paths[index] = here
            if keep:
                cut, path = node, here
        stack.extend((child, cut, path) for child in reversed(node.children))
    return PrefixTree(segments=tuple(segments), paths=tuple(paths))
