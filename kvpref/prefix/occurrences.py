"""How often tokens that run once occur in the sequences: what a mean over the sequences' tokens weights them by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

from kvpref.prefix.tree import PrefixTree


@dataclass(frozen=True, kw_only=True)
class Occurrences:
    """How many sequences hold the rows of a pass, run by run.

    Attributes:
        owners: (M,) the micro-batches that hold some of the rows.
        lengths: (R,) rows of each run.
        counts: Per owner, (R,) how many of its sequences hold each run.
    """

    owners: tuple[int, ...]
    lengths: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]


def count_holders(tree: PrefixTree, owners: AbstractSequence[int]) -> list[Counter[int]]:
    """Per segment, how many sequences of each owner hold it.

    Args:
        tree: The prefix tree.
        owners: Per sequence, the micro-batch that it belongs to.
    """
    found: list[Counter[int]] = [Counter() for _ in tree.segments]
    for path, owner in zip(tree.paths, owners, strict=True):
        for index in path:
            found[index][owner] += 1
    return found


def occurrences_of(holders: AbstractSequence[Counter[int]], runs: Iterable[tuple[int, int]]) -> Occurrences:
    """Those of (segment, length) runs that stand one after another."""
    runs = list(runs)
    owners = sorted({owner for segment, _ in runs for owner in holders[segment]})
    return Occurrences(
        owners=tuple(owners),
        lengths=tuple(length for _, length in runs),
        counts=tuple(tuple(holders[segment][owner] for segment, _ in runs) for owner in owners),
    )


def tree_occurrences(tree: PrefixTree) -> Occurrences:
    """Those of a whole tree of one micro-batch, its levels one after another."""
    order = sorted(range(len(tree.segments)), key=lambda index: tree.segments[index].depth)
    holders = count_holders(tree, [0] * len(tree.paths))
    return occurrences_of(holders, ((index, len(tree.segments[index])) for index in order))
