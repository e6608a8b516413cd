"""Token counts and common beginnings, which tokenization, planning and statistics need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvpref.groups import Group


class GroupLengths(NamedTuple):
    """Token counts of one group (or of several together)."""

    unique_tokens: int
    """The tokens that all sequences begin with once, and the rest of each sequence."""

    total_tokens: int
    """The sum over the sequences."""

    max_sequence_tokens: int
    """The longest sequence."""

    num_sequences: int
    """How many sequences there are."""


def measure_group(group: Group) -> GroupLengths:
    """Count the tokens of one group."""
    return measure_sequences([sequence.input_ids for sequence in group.sequences])


def measure_sequences(sequences: Sequence[Sequence[int]]) -> GroupLengths:
    """Count the tokens of the sequences (at least one) of one group, all of one list type."""
    total = sum(map(len, sequences))
    # What the smallest and the largest of sorted lists have in common, all of them have.
    shared = num_shared(min(sequences), max(sequences))  # type: ignore[type-var]
    return GroupLengths(total - shared * (len(sequences) - 1), total, max(map(len, sequences)), len(sequences))


def num_shared(first: Sequence[object], second: Sequence[object]) -> int:
    """The length of the longest common prefix of two token lists or texts."""
    shortest = min(len(first), len(second))
    return next((index for index in range(shortest) if first[index] != second[index]), shortest)
