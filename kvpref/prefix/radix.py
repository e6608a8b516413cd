"""The radix tree of token lists: where they part, before it is decided what becomes a segment."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(eq=False, slots=True)
class Node:
    """A place where token lists part: their first `end` tokens are the same.

    Attributes:
        end: How many tokens all lists below share; 0 at the root.
        inner: The places below where lists part, ordered by first list.
        leaves: The lists that share nothing beyond `end`, in order.
        above: The next place above; None at the root.
        first: The first leaf below.
    """

    end: int
    inner: list[Node] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)
    above: Node | None = None
    first: int = -1

    def close(self) -> None:
        """Sort everything below into the caller's order, so that no choice depends on token values."""
        self.inner.sort(key=lambda node: node.first)
        self.leaves.sort()
        self.first = min([node.first for node in self.inner[:1]] + self.leaves[:1])


@dataclass(frozen=True, kw_only=True)
class RadixTree:
    """Where token lists part; lists that are a prefix of another are left out.

    Attributes:
        root: The root node, whose `end` is 0.
        within: Per list, the first leaf that begins with the whole list.
    """

    root: Node
    within: tuple[int, ...]

    def nodes(self) -> Iterator[tuple[Node, Node]]:
        """Every node but the root, parents first, with the one above it."""
        stack = [(node, self.root) for node in reversed(self.root.inner)]
        while stack:
            node, above = stack.pop()
            yield node, above
            stack.extend((child, node) for child in reversed(node.inner))


def build_radix_tree(keys: AbstractSequence[IntArray], *, are_token_ids: bool = True) -> RadixTree:
    """The radix tree of token lists.

    Args:
        keys: The lists, each (T,) int64 with at least one token.
        are_token_ids: Whether all of them fit into 32 bits.
    """
    # Whatever the byte order, sorted neighbours share the longest prefixes, and bytes compare at the speed of memory.
    dtype = np.int32 if are_token_ids else np.int64
    texts = [key.astype(dtype, copy=False).tobytes() for key in keys]
    order = sorted(range(len(keys)), key=texts.__getitem__)
    growing = _Growing()
    ends: list[int] = []  # lists that are a prefix of the next one
    within = list(range(len(keys)))
    for before, after in zip(order, [*order[1:], None], strict=True):
        shared = 0
        if after is not None:
            # Mostly a turn's history is the beginning of the next turn's, and bytes say so faster than numbers.
            begins = texts[after].startswith(texts[before])
            shared = len(keys[before]) if begins else num_shared(keys[before], keys[after])
        if after is not None and shared == len(keys[before]):
            ends.append(before)
            within[before] = after
        else:
            growing.add(before, shared)
    for index in reversed(ends):
        within[index] = growing.first_leaf(within[within[index]], len(keys[index]))
    return RadixTree(root=growing.root, within=tuple(within))


class _Growing:
    """A radix tree to which lists are added in lexicographic order.

    Attributes:
        root: The root of the tree.
    """

    def __init__(self) -> None:
        self.root = Node(0)
        self._open = [self.root]  # the nodes above the next list
        self._node_of: dict[int, Node] = {}

    def add(self, leaf: int, shared: int) -> None:
        """Add a list that shares its first `shared` tokens with the next one."""
        done: Node | None = None
        while self._open[-1].end > shared:
            self._put(self._open[-1], done, leaf)
            done = self._open.pop()
            done.close()
        if self._open[-1].end < shared:
            self._open.append(Node(shared))
        self._put(self._open[-1], done, leaf)
        if not shared:
            self.root.close()

    def _put(self, node: Node, done: Node | None, leaf: int) -> None:
        if done is None:
            node.leaves.append(leaf)
            self._node_of[leaf] = node
        else:
            node.inner.append(done)
            done.above = node

    def first_leaf(self, leaf: int, num_tokens: int) -> int:
        """The first leaf that begins with the first `num_tokens` tokens of `leaf`."""
        found, node = leaf, self._node_of[leaf]
        while node.end >= num_tokens and node.above is not None:
            found, node = node.first, node.above
        return found


def num_shared(first: IntArray, second: IntArray) -> int:
    """Number of leading tokens that both lists share."""
    shortest = min(len(first), len(second))
    differs = first[:shortest] != second[:shortest]
    place = int(differs.argmax()) if shortest else 0
    return place if shortest and differs[place] else shortest


def shared_prefix_length(first: AbstractSequence[object], second: AbstractSequence[object]) -> int:
    """Like `num_shared`, for lists, tuples, arrays or texts, both of one type."""
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
