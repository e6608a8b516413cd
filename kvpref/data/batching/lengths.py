"""Token counts and common beginnings, which tokenization, planning and statistics need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvpref.records.groups import Group


class GroupLengths(NamedTuple):
    """Counts of one group (or of several together, see `combine`).

    `shared` means that the tokens that all sequences of a group begin with are there once. What only some sequences
    share, or several groups, is counted apart (but see `combine_sharing`): a prefix tree may find less work than these
    counts, never more, as long as its `min_shared_tokens` and `max_depth` let it share what a group begins with.
    """

    unique_tokens: int
    """The tokens that all sequences begin with once, and the rest of each sequence."""

    total_tokens: int
    """The sum over the sequences."""

    max_sequence_tokens: int
    """The longest sequence."""

    num_sequences: int
    """How many sequences there are."""

    unique_pairs: int
    """Query-key pairs of causal attention with the beginning shared: P(P+1)/2 + sum of R*P + R(R+1)/2."""

    total_pairs: int
    """Query-key pairs of causal attention with each sequence alone: sum of L(L+1)/2."""

    unique_scored: int
    """Scored tokens, those in the shared beginning once (where any sequence scores them)."""

    total_scored: int
    """Scored tokens of all sequences."""


def measure_group(group: Group) -> GroupLengths:
    """Count the tokens, attention pairs and scored tokens of one group."""
    lengths = list(map(len, group.sequences))
    repeats = len(lengths) - 1
    shared = common_beginning(group)
    scored = [sequence.scored.count(True) for sequence in group.sequences]
    starts = [sequence.scored[:shared] for sequence in group.sequences]
    scored_in_starts = sum(start.count(True) for start in starts)
    unique_in_starts = sum(map(any, zip(*starts, strict=True))) if scored_in_starts else 0
    total_pairs = sum(map(_causal_pairs, lengths))
    return GroupLengths(
        unique_tokens=sum(lengths) - shared * repeats,
        total_tokens=sum(lengths),
        max_sequence_tokens=max(lengths),
        num_sequences=len(lengths),
        unique_pairs=total_pairs - _causal_pairs(shared) * repeats,
        total_pairs=total_pairs,
        unique_scored=sum(scored) - scored_in_starts + unique_in_starts,
        total_scored=sum(scored),
    )


def common_beginning(group: Group) -> int:
    """How many tokens all sequences begin with; placeholders of different images differ."""
    sequences = [sequence.tree_ids for sequence in group.sequences]
    # What the smallest and the largest of sorted lists have in common, all of them have.
    return num_shared(min(sequences), max(sequences))


def repeat_short_beginning(lengths: GroupLengths, min_shared_tokens: int) -> GroupLengths:
    """The counts of a group whose beginning is repeated in each sequence where it is shorter than may be shared."""
    repeats = lengths.num_sequences - 1
    if not repeats or (lengths.total_tokens - lengths.unique_tokens) // repeats >= min_shared_tokens:
        return lengths
    return lengths._replace(
        unique_tokens=lengths.total_tokens, unique_pairs=lengths.total_pairs, unique_scored=lengths.total_scored
    )


def combine(lengths: Iterable[GroupLengths]) -> GroupLengths:
    """The counts of several groups (at least one) together."""
    columns = GroupLengths(*zip(*lengths, strict=True))  # type: ignore[arg-type]
    sums = GroupLengths(*map(sum, columns))  # type: ignore[arg-type]
    return sums._replace(max_sequence_tokens=max(columns.max_sequence_tokens))  # type: ignore[call-overload]


def combine_sharing(groups: Sequence[GroupLengths], num_tokens: int, min_shared_tokens: int) -> GroupLengths:
    """The counts of groups together when the first `num_tokens`, which they have in common, are there once.

    An upper bound for the prefix tree. Its groups may share more than `num_tokens`, so that what remains of a group's
    beginning is too short for a segment, and repeated in each sequence; the worst case is counted.
    """
    saved_tokens = num_tokens * (len(groups) - 1)
    saved_pairs = _causal_pairs(num_tokens) * (len(groups) - 1)
    for group in groups:
        repeats = group.num_sequences - 1
        if repeats:
            beginning = (group.total_tokens - group.unique_tokens) // repeats
            rest = min(beginning - num_tokens, min_shared_tokens - 1)
            saved_tokens -= rest * repeats
            saved_pairs -= (_causal_pairs(beginning) - _causal_pairs(beginning - rest)) * repeats
    together = combine(groups)
    if saved_tokens <= 0:
        return together
    return together._replace(
        unique_tokens=together.unique_tokens - saved_tokens, unique_pairs=together.unique_pairs - saved_pairs
    )


def num_shared(first: Sequence[object], second: Sequence[object]) -> int:
    """The length of the longest common prefix of two token lists or texts."""
    shortest = min(len(first), len(second))
    start = 0
    # Slices compare at the speed of C; what differs lies in the first one that does.
    while start < shortest and first[start : start + 256] == second[start : start + 256]:
        start += 256
    return next((index for index in range(start, shortest) if first[index] != second[index]), shortest)


def _causal_pairs(num_tokens: int) -> int:
    return num_tokens * (num_tokens + 1) // 2
