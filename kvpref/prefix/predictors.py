"""Which rows of a prefix tree's levels predict scored tokens, and the indices that lead from them to the sequences."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvpref.prefix.radix import IntArray
from kvpref.prefix.tree import PrefixTree

Flags = npt.NDArray[np.bool_]


class Predictors(NamedTuple):
    """The rows that predict the unique scored tokens.

    Attributes:
        rows: Per level (P_d,) int64 in order; a row occurs once per distinct token that it predicts.
        targets: Per level (P_d,) int64, those tokens; 0 after the last one of a segment.
        token_index: (S,) int64 into the concatenation of all levels' rows, for each scored token of the sequences.
        cu_seqlens: (N + 1,) int64, offsets of each sequence in `token_index`.
    """

    rows: tuple[IntArray, ...]
    targets: tuple[IntArray, ...]
    token_index: IntArray
    cu_seqlens: IntArray


def find_predictors(tree: PrefixTree, order: IntArray, tokens: IntArray, scored: AbstractSequence[Flags]) -> Predictors:
    """Find the row that predicts each scored token.

    Args:
        tree: The prefix tree.
        order: (S,) int64, its segments level after level, as their rows stand.
        tokens: (T,) int64, the tokens of all rows in that order.
        scored: Per sequence one flag per token; one extra flag asks for the row of the last token.
    """
    lengths = tree.lengths[order]
    first_rows = np.empty_like(tree.lengths)
    first_rows[order] = np.cumsum(lengths) - lengths
    # Addresses leave one place per segment for what follows its last token.
    first_addresses = np.empty_like(first_rows)
    first_addresses[order] = first_rows[order] + np.arange(len(order))
    addresses, cu_seqlens = _addresses(tree, first_addresses, scored)

    is_scored = np.zeros(len(tokens) + len(order), dtype=bool)
    is_scored[addresses] = True
    unique = np.flatnonzero(is_scored)
    begins = first_addresses[order]
    bounds = np.searchsorted(unique, begins)
    rows = unique - np.repeat(np.arange(len(order)), np.diff(bounds, append=len(unique)))
    targets = np.take(tokens, rows, mode="clip")
    targets[np.searchsorted(unique, (begins + lengths)[is_scored[begins + lengths]])] = 0
    predictors = rows - 1
    # The first token of a segment is predicted in its parent, before the place where it branches off.
    are_first = is_scored[begins]
    firsts, segments = bounds[are_first], order[are_first]
    parents = tree.parents[segments]
    assert (parents >= 0).all(), "the first token of a sequence cannot be scored"
    predictors[firsts] = first_rows[parents] + tree.starts[segments] - tree.starts[parents] - 1

    places = _places_in_order(predictors, firsts)
    numbers = np.empty(len(is_scored), dtype=np.int64)
    numbers[unique] = places
    predictors, targets = _permuted(predictors, places), _permuted(targets, places)
    level_rows = np.cumsum(np.bincount(tree.depths, weights=tree.lengths)).astype(np.int64)
    cuts = np.searchsorted(predictors, level_rows[:-1])
    bases = np.append(0, level_rows[:-1])
    return Predictors(
        rows=tuple(own - base for own, base in zip(np.split(predictors, cuts), bases, strict=True)),
        targets=tuple(np.split(targets, cuts)),
        token_index=numbers[addresses],
        cu_seqlens=cu_seqlens,
    )


def _places_in_order(values: IntArray, others: IntArray) -> IntArray:
    """(U,) int64, the place of each value if all were sorted; all but the `others` are sorted already."""
    is_other = np.zeros(len(values), dtype=bool)
    is_other[others] = True
    others = others[np.argsort(values[others], kind="stable")]
    of_others = np.searchsorted(values[~is_other], values[others], side="right") + np.arange(len(others))
    is_free = np.ones(len(values), dtype=bool)
    is_free[of_others] = False
    places = np.empty_like(values)
    places[~is_other], places[others] = np.flatnonzero(is_free), of_others
    return places


def _permuted(values: IntArray, places: IntArray) -> IntArray:
    found = np.empty_like(values)
    found[places] = values
    return found


def _addresses(
    tree: PrefixTree, first_addresses: IntArray, scored: AbstractSequence[Flags]
) -> tuple[IntArray, IntArray]:
    """The address of each scored token's segment and the token's offset there; and each sequence's offsets."""
    bases = np.cumsum([0, *map(len, scored)])
    found = np.flatnonzero(np.concatenate(scored))
    starts = tree.starts[tree.path_segments]
    steps = bases[tree.path_sequences] + starts
    counts = np.diff(np.searchsorted(found, steps), append=len(found))
    shifts = first_addresses[tree.path_segments] - steps
    return found + np.repeat(shifts, counts), np.searchsorted(found, bases)
