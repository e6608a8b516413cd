"""Which groups begin alike, so that a plan can put them into one optimizer step.

Pure Python on token lists, sorted once: neighbours in sorted order have the longest common beginnings, and runs of
neighbours with a common beginning nest, which gives the tree of Abouelhoda et al. 2004, "Replacing suffix trees with
enhanced suffix arrays" (their LCP intervals), in linear time.

What counts is what a random step would not share anyway. A few-shot prompt in every row is in every step, whatever the
order, and so is a system prompt of a tenth of the rows, as soon as a step has more than ten groups. Such beginnings are
*common*: they form no cluster, and below them only tokens beyond them count. Among the others, which nest (a story, its
questions), those that together save the most tokens become clusters. One that exceeds a step (a story with more
questions than a step has groups) is cut into parts that fill steps.

The price: the groups of a step are less independent than in random order. Beginnings that many groups share, such as
system prompts of a mixture of tasks, are usually common, so that steps keep the mixture.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvpref.errors import InputError
from kvpref.prefix.radix import shared_prefix_length


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """A partition of the groups by common beginnings."""

    of_group: tuple[int, ...]
    """Per group the smallest index of its cluster's groups: its own if it is alone."""

    shared_tokens: tuple[int, ...]
    """Per group the tokens that all groups of its cluster begin with; 0 if it is alone."""

    min_shared_tokens: int
    """The fewest tokens that a shared segment may have."""

    @property
    def num_sharing_groups(self) -> int:
        """Number of groups that are not alone."""
        return sum(tokens > 0 for tokens in self.shared_tokens)

    @property
    def largest(self) -> int:
        """Number of groups in the largest cluster; 1 if all are alone."""
        sizes = dict.fromkeys(self.of_group, 0)
        for cluster in self.of_group:
            sizes[cluster] += 1
        return max(sizes.values(), default=0)


@dataclass(eq=False, slots=True)
class _Run:
    """Neighbours in sorted order with a common beginning."""

    shared: int
    """Tokens that all of them begin with."""

    start: int
    """Place of the first in sorted order."""

    inside: list[_Run] = field(default_factory=list)
    """Disjoint runs inside it that share more, in order."""

    end: int = 0
    """Place after the last."""

    common: int = 0
    """Tokens of the longest common beginning around it, in the sense of the module's docstring."""

    @property
    def num_groups(self) -> int:
        return self.end - self.start


def find_clusters(beginnings: Sequence[Sequence[int]], *, groups_per_step: int, min_shared_tokens: int) -> Clusters:
    """Cluster groups that begin alike.

    Deterministic: depends only on the tokens and the two numbers. Takes about as long as sorting.

    Args:
        beginnings: Per group, its tokens up to the first scored one, which all its sequences begin with; lists, tuples
            or arrays that can be compared with one another.
        groups_per_step: Groups of an optimizer step over all ranks.
        min_shared_tokens: Shorter beginnings form no cluster.

    Raises:
        InputError: If a number is below 1.
    """
    for name, value in (("groups_per_step", groups_per_step), ("min_shared_tokens", min_shared_tokens)):
        if value < 1:
            raise InputError(f"{name} must be at least 1; got {value}")
    # Sequences in general need not be comparable; lists, tuples and arrays are.
    order: list[int] = sorted(range(len(beginnings)), key=beginnings.__getitem__)  # type: ignore[arg-type]
    runs = _nested_runs([beginnings[group] for group in order])
    _find_common(runs, groups_per_step)
    of_group, shared_tokens = list(range(len(order))), [0] * len(order)
    for run in _choose(runs, groups_per_step, min_shared_tokens):
        members = order[run.start : run.end]
        for group in members:
            of_group[group], shared_tokens[group] = min(members), run.shared
    return Clusters(of_group=tuple(of_group), shared_tokens=tuple(shared_tokens), min_shared_tokens=min_shared_tokens)


def as_wholes(beginnings: Sequence[array[int]]) -> list[array[int]]:
    """Stand-in tokens of the same lengths that begin alike only if whole beginnings are equal."""
    numbers: dict[bytes, int] = {}
    return [
        array("q", [numbers.setdefault(array("q", beginning).tobytes(), len(numbers))]) * len(beginning)
        for beginning in beginnings
    ]


def _nested_runs(ordered: list[Sequence[int]]) -> list[_Run]:
    """All runs of sorted lists, inner runs before outer ones; the last holds everything."""
    finished: list[_Run] = []
    open_runs = [_Run(shared=0, start=0)]
    for place in range(1, len(ordered) + 1):
        shared, start = 0, place - 1
        if place < len(ordered):
            shared = shared_prefix_length(ordered[place - 1], ordered[place])
        inside: list[_Run] = []
        while open_runs[-1].shared > shared:
            run = open_runs.pop()
            run.end, start = place, run.start
            finished.append(run)
            if open_runs[-1].shared >= shared:
                open_runs[-1].inside.append(run)
            else:
                inside = [run]
        if open_runs[-1].shared < shared:
            open_runs.append(_Run(shared=shared, start=start, inside=inside))
    open_runs[0].end = len(ordered)
    return [*finished, open_runs[0]]


def _find_common(runs: list[_Run], groups_per_step: int) -> None:
    """Set on every run what is common around it; a common run counts itself."""
    num_groups = runs[-1].num_groups
    for run in reversed(runs):
        # More of its groups than steps: a random step holds one on average. One that fits into a step can be gathered.
        exceeds_a_step = run.num_groups > groups_per_step
        if run.num_groups == num_groups or (exceeds_a_step and run.num_groups * groups_per_step > num_groups):
            run.common = run.shared
        for inner in run.inside:
            inner.common = run.common


def _choose(runs: list[_Run], groups_per_step: int, min_shared_tokens: int) -> list[_Run]:
    """The runs chosen as clusters, none inside another."""
    saved: dict[_Run, int] = {}
    gathered: set[_Run] = set()
    for run in runs:
        own_tokens = run.shared - run.common
        inside = sum(saved[inner] for inner in run.inside)
        saved[run] = inside
        if own_tokens >= min_shared_tokens:
            # Encoded once per step that contains the cluster, instead of once per group.
            own = own_tokens * (run.num_groups - -(-run.num_groups // groups_per_step))
            if own > inside:
                gathered.add(run)
                saved[run] = own
    chosen, waiting = [], [runs[-1]]
    while waiting:
        run = waiting.pop()
        if run in gathered:
            chosen.append(run)
        else:
            waiting.extend(run.inside)
    return chosen
