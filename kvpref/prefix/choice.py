"""Which shared runs of tokens become segments, and at which depth.

A run that several sequences share is stored once or repeated in each. Stored once, it may be a segment of its own, or
the beginning of a longer one that the other sequences branch off from, which needs no further pass. So a tree of any
depth runs in few passes: those off its longest branch one deeper, those off these again one deeper, and so on (the
heavy paths of Sleator and Tarjan 1983), at most log2 of the number of sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvpref.prefix.radix import IntArray, Node, RadixTree


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may become a segment.

    Attributes:
        min_shared_tokens: Fewest tokens of a run stored once, counted from where its segment begins.
        max_depth: Depth of the deepest segment; None for any.
        pass_tokens: Tokens that each pass beyond the second has to save.
        branches_inside: Whether sequences may branch off inside a segment, or only at its end.

    Raises:
        ValueError: If a number is out of range.
    """

    min_shared_tokens: int = 1
    max_depth: int | None = None
    pass_tokens: int = 0
    branches_inside: bool = True

    def __post_init__(self) -> None:
        if self.min_shared_tokens < 1:
            raise ValueError(f"min_shared_tokens must be at least 1; got {self.min_shared_tokens}")
        if self.max_depth is not None and self.max_depth < 0:
            raise ValueError(f"max_depth must be None or at least 0; got {self.max_depth}")
        if self.pass_tokens < 0:
            raise ValueError(f"pass_tokens must be at least 0; got {self.pass_tokens}")


def states_pass_tokens(min_shared_tokens: int) -> int:
    """`Limits.pass_tokens` where sequences branch off only at ends, so that a tree may have dozens of levels.

    It is what sharing sixteen runs just below the minimum would save; 0 where every token is shared.
    """
    return 16 * (min_shared_tokens - 1)


@dataclass(eq=False, slots=True)
class Part:
    """A chosen segment: the tokens [start, end) of sequence `source`."""

    start: int
    end: int
    source: int
    parent: Part | None
    children: list[Part] = field(default_factory=list)


_APART, _KEPT = -2, -1
"""How the tokens of a node are stored, for the `kinds` of a row; 0 and above is the number of a child."""


class _Row(NamedTuple):
    """What is stored below each of the places above a node where its segment may begin, the root first.

    Attributes:
        tokens: (A,) int64, the fewest tokens.
        kinds: (A,) int64, how: apart in each child, kept as a segment that ends here, or as the beginning of one that
            goes on to the child of this number.
    """

    tokens: IntArray
    kinds: IntArray


_Table = dict[Node, _Row]


def choose_parts(tree: RadixTree, lengths: list[int], limits: Limits) -> list[Part]:
    """The root parts of the choice that stores the fewest tokens in the fewest passes.

    Args:
        tree: The radix tree.
        lengths: Number of tokens per sequence.
        limits: What may become a segment.
    """
    chooser = _Chooser(tree, lengths, limits)
    return _Emitter(lengths, chooser.tables(), chooser.places).emit(tree.root)


class _Chooser:
    """A dynamic programme, children first.

    The state is a node, the cut where the segment begins that holds the tokens before it, and how many levels there may
    be below that segment. The tokens of the node since the cut are stored once, as a segment that ends there, or as the
    beginning of one that continues in one of its children, or in each child by itself.

    Attributes:
        places: Node -> number of nodes above it.
    """

    def __init__(self, tree: RadixTree, lengths: list[int], limits: Limits) -> None:
        self._root, self._lengths, self._limits = tree.root, lengths, limits
        self.places = {tree.root: 0}
        ends_above = {tree.root: np.empty(0, dtype=np.int64)}
        for node, above in tree.nodes():
            self.places[node] = 1 + self.places[above]
            ends_above[node] = np.append(ends_above[above], above.end)
        del ends_above[tree.root]
        self._nodes = list(reversed(ends_above.items()))
        # The tokens of a node's leaves if they were stored from the root on.
        self._leaves = {node: sum(lengths[leaf] for leaf in node.leaves) for node in ends_above}

    def tables(self) -> list[_Table]:
        """One table per number of levels below the current segment: none, one, and so on, as long as they pay."""
        limits = self._limits
        unbounded: _Table = {}
        self._fill(unbounded, unbounded)
        if limits.max_depth is None and not limits.pass_tokens and not limits.branches_inside:
            # As many levels as there are places one below the other, which may be hundreds.
            return [unbounded] * (1 + max(self.places.values()))
        tables = [self._table(None)]
        found = [self._total(tables[0])]
        fewest = self._total(unbounded)
        while found[-1] > fewest and (limits.max_depth is None or len(tables) <= limits.max_depth):
            tables.append(self._table(tables[-1]))
            found.append(self._total(tables[-1]))
        costs = [tokens + max(0, depth - 1) * limits.pass_tokens for depth, tokens in enumerate(found)]
        return tables[: 1 + costs.index(min(costs))]

    def _table(self, below: _Table | None) -> _Table:
        table: _Table = {}
        self._fill(table, below)
        return table

    def _fill(self, table: _Table, below: _Table | None) -> None:
        for node, ends in self._nodes:
            table[node] = self._choose(node, ends, table, below)

    def _choose(self, node: Node, ends: IntArray, table: _Table, below: _Table | None) -> _Row:
        leaves, num_leaves = self._leaves[node], len(node.leaves)
        tokens = leaves - num_leaves * ends
        for child in node.inner:
            tokens += table[child].tokens[:-1]
        kinds = np.full(len(ends), _APART)
        if below is None:
            return _Row(tokens, kinds)
        runs = node.end - ends
        may_share = runs >= self._limits.min_shared_tokens
        # What branches off here if it all belonged to one segment.
        others = leaves - num_leaves * node.end + sum(int(below[child].tokens[-1]) for child in node.inner)
        choices = [(_KEPT, runs + others)]
        for number, child in enumerate(node.inner if self._limits.branches_inside else ()):
            choices.append((number, others - below[child].tokens[-1] + table[child].tokens[:-1]))
        for kind, found in choices:
            is_better = (found < tokens) & may_share
            if is_better.any():  # mostly not
                tokens, kinds = np.where(is_better, found, tokens), np.where(is_better, kind, kinds)
        return _Row(tokens, kinds)

    def _total(self, table: _Table) -> int:
        root = self._root
        own = sum(self._lengths[leaf] for leaf in root.leaves)
        return own + sum(int(table[child].tokens[0]) for child in root.inner)


@dataclass(eq=False, slots=True)
class _Beginning:
    """Where segments begin: at a position, inside `host`, the first part of another beginning.

    Attributes:
        start: The position.
        host: The beginning of the segment that holds the tokens before; None at the beginning of sequences.
        around: The same place as seen from further above.
        part: The first part that begins here.
    """

    start: int
    host: _Beginning | None
    around: _Beginning | None = None
    part: Part | None = None


class _Task(NamedTuple):
    """A branch still to be followed: a node, or a sequence that shares nothing further.

    Attributes:
        below: The node or the sequence.
        cut: The node where its segment begins.
        levels: How many levels there may be below that segment.
        begins: Where the segment begins.
    """

    below: Node | int
    cut: Node
    levels: int
    begins: _Beginning


class _Emitter:
    """Follows the choices from the root down."""

    def __init__(self, lengths: list[int], tables: list[_Table], places: Mapping[Node, int]) -> None:
        self._lengths, self._tables, self._places = lengths, tables, places
        self._roots: list[Part] = []

    def emit(self, root: Node) -> list[Part]:
        """The root parts."""
        stack = _tasks_below(root, root, len(self._tables) - 1, _Beginning(0, None))
        while stack:
            task = stack.pop()
            if isinstance(task.below, int):
                self._add(task.begins, self._lengths[task.below], task.below)
            else:
                stack.extend(self._follow(task.below, task))
        return self._roots

    def _follow(self, node: Node, task: _Task) -> list[_Task]:
        _, cut, levels, begins = task
        kind = int(self._tables[levels][node].kinds[self._places[cut]])
        if kind == _APART:
            return _tasks_below(node, cut, levels, begins)
        host = _Beginning(begins.start, begins.host, around=begins)
        tasks = _tasks_below(node, node, levels - 1, _Beginning(node.end, host))
        if kind == _KEPT:
            self._add(host, node.end, node.first)
            return tasks
        heavy = node.inner[kind]
        # The last one is followed first, with everything below it: the others need the part that it becomes.
        return [*(task for task in tasks if task.below is not heavy), _Task(heavy, cut, levels, host)]

    def _add(self, begins: _Beginning, end: int, source: int) -> None:
        parent = None if begins.host is None else begins.host.part
        part = Part(begins.start, end, source, parent)
        (self._roots if parent is None else parent.children).append(part)
        around: _Beginning | None = begins
        while around is not None and around.part is None:
            around.part = part
            around = around.around


def _tasks_below(node: Node, cut: Node, levels: int, begins: _Beginning) -> list[_Task]:
    below: list[Node | int] = [*node.leaves, *node.inner]
    return [_Task(item, cut, levels, begins) for item in below]
