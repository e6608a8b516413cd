"""Token counts of groups, which planning and statistics need."""

from __future__ import annotations

from typing import NamedTuple

from kvpref.data.tokenization import num_shared_tokens
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
    sequences = [sequence.input_ids for sequence in group.sequences]
    total = sum(map(len, sequences))
    # What the smallest and the largest of a sorted list have in common, all of them have.
    shared = num_shared_tokens(min(sequences), max(sequences))
    return GroupLengths(total - shared * (len(sequences) - 1), total, max(map(len, sequences)), len(sequences))
