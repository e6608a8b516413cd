"""Token counts and common beginnings, used by planning and statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvpref.prefix import radix
from kvpref.prefix.building import build_tree
from kvpref.prefix.choice import states_pass_tokens
from kvpref.records.groups import Group, IntArray
from kvpref.records.groups import Sequence as TokenSequence


class GroupLengths(NamedTuple):
    """Counts of one group, or of several combined (see `combine`), by the prefix tree of its sequences.

    A sequence here is a row that the model runs, one of `Group.parts`. Tokens shared by several groups are counted in
    each (but see `combine_sharing`): the prefix tree of a micro-batch may find less work than these counts, never more.
    """

    unique_tokens: int
    """Tokens of the prefix tree, in which shared tokens occur once."""

    total_tokens: int
    """The sum over the sequences."""

    max_sequence_tokens: int
    """The longest sequence."""

    num_sequences: int
    """How many sequences there are."""

    unique_pairs: int
    """Query-key pairs of causal attention in the tree: each token with those before it on its path."""

    total_pairs: int
    """Query-key pairs of causal attention with each sequence alone: sum of L(L+1)/2."""

    unique_scored: int
    """Scored tokens of the tree: those that any sequence scores."""

    total_scored: int
    """Scored tokens of all sequences."""

    beginning_tokens: int = 0
    """Tokens that all sequences of a group begin with; 0 if not shared, and for one sequence or several groups."""


class SharingLimits(NamedTuple):
    """What prefix trees may share, as in `kvpref.plan.sharing.Sharing`."""

    min_shared_tokens: int = 1
    """Shared runs with fewer tokens are repeated."""

    max_depth: int | None = None
    """Deepest segment; 0 shares nothing, None allows any depth."""

    whole_segments: bool = False
    """Whether sequences branch off only at the ends of segments."""


def measure_group(group: Group, limits: SharingLimits | None = None) -> GroupLengths:
    """Count the tokens, attention pairs and scored tokens of one group; by default everything shared counts once."""
    limits = SharingLimits() if limits is None else limits
    parts = group.parts
    lengths = list(map(len, parts))
    total_pairs = sum(map(_causal_pairs, lengths))
    total_scored = sum(part.num_scored for part in parts)
    counts = GroupLengths(
        unique_tokens=sum(lengths),
        total_tokens=sum(lengths),
        max_sequence_tokens=max(lengths),
        num_sequences=len(lengths),
        unique_pairs=total_pairs,
        total_pairs=total_pairs,
        unique_scored=total_scored,
        total_scored=total_scored,
    )
    if len(parts) == 1:
        return counts
    ids = [part.tree_ids for part in parts]
    beginning = common_length(ids)
    is_shared = beginning >= limits.min_shared_tokens and limits.max_depth != 0
    if not _parts_once(ids, beginning):
        return _count_tree(counts, parts, ids, limits)._replace(beginning_tokens=beginning if is_shared else 0)
    if not is_shared:
        return counts
    starts = np.array([part.flags[:beginning] for part in parts])
    return counts._replace(
        unique_tokens=counts.total_tokens - beginning * (len(parts) - 1),
        unique_pairs=total_pairs - _causal_pairs(beginning) * (len(parts) - 1),
        unique_scored=total_scored - int(starts.sum()) + int(starts.any(axis=0).sum()),
        beginning_tokens=beginning,
    )


def _parts_once(ids: Sequence[IntArray], beginning: int) -> bool:
    """Whether no two sequences share more than the common beginning of all, as with a prompt and its responses."""
    if min(map(len, ids)) == beginning:
        return False
    return len({int(own[beginning]) for own in ids}) == len(ids)


def _count_tree(
    counts: GroupLengths, parts: Sequence[TokenSequence], ids: Sequence[IntArray], limits: SharingLimits
) -> GroupLengths:
    """The counts, with those of the prefix tree filled in."""
    tree = build_tree(
        ids,
        min_shared_tokens=limits.min_shared_tokens,
        max_depth=limits.max_depth,
        pass_tokens=states_pass_tokens(limits.min_shared_tokens) if limits.whole_segments else 0,
        branches_inside=not limits.whole_segments,
    )
    offsets = np.cumsum(tree.lengths) - tree.lengths
    scored = np.zeros(tree.num_unique_tokens, dtype=np.bool_)
    # A token at position p of a sequence is token p + shift of the tree.
    shifts = (offsets - tree.starts).tolist()
    for index, part in enumerate(parts):
        for segment, start, stop in tree.steps(index):
            scored[start + shifts[segment] : stop + shifts[segment]] |= part.flags[start:stop]
    ends = tree.starts + tree.lengths
    return counts._replace(
        unique_tokens=tree.num_unique_tokens,
        unique_pairs=int((ends * (ends + 1) // 2 - tree.starts * (tree.starts + 1) // 2).sum()),
        unique_scored=int(scored.sum()),
    )


def common_beginning(group: Group) -> int:
    """Number of tokens that all sequences begin with; placeholders of different images differ."""
    return common_length([part.tree_ids for part in group.parts])


def common_length(rows: Sequence[npt.NDArray[np.signedinteger[Any]]]) -> int:
    """The length of the longest common prefix of integer arrays (T,), at least one."""
    first, *others = rows
    shared = len(first)
    for other in others:
        shared = radix.num_shared(first[:shared], other)
    return shared


def combine(lengths: Iterable[GroupLengths]) -> GroupLengths:
    """The combined counts of several groups (at least one)."""
    first, *others = lengths
    if not others:
        return first
    columns = tuple(zip(first, *others, strict=True))
    longest = GroupLengths._fields.index("max_sequence_tokens")
    summed = (max(own) if index == longest else sum(own) for index, own in enumerate(columns))
    return GroupLengths(*summed)._replace(beginning_tokens=0)


def combine_sharing(groups: Sequence[GroupLengths], num_tokens: int, min_shared_tokens: int) -> GroupLengths:
    """The combined counts of groups if the first `num_tokens`, common to all sequences, occur once.

    An upper bound for the prefix tree, which may keep the segments of each group's own tree below these tokens. A
    group's common beginning then starts after them, so that the rest may be too short to be shared and is repeated in
    each sequence. The groups may also have more in common, which saves tokens, but may leave such a rest where there
    was none. The worst case is counted.
    """
    together = combine(groups)
    places = _places_of_rests(groups, num_tokens, min_shared_tokens)
    saved = [_saved(groups, place, min_shared_tokens) for place in places]
    saved_tokens, saved_pairs = (max(0, min(column)) for column in zip(*saved, strict=True))
    repeated_scored = 0
    for group in groups:
        rest = max(_repeated_rest(group, place, min_shared_tokens) for place in places)
        repeated_scored += min(rest * (group.num_sequences - 1), group.total_scored - group.unique_scored)
    return together._replace(
        unique_tokens=together.unique_tokens - saved_tokens,
        unique_pairs=together.unique_pairs - saved_pairs,
        unique_scored=together.unique_scored + repeated_scored,
    )


def _places_of_rests(groups: Sequence[GroupLengths], num_tokens: int, min_shared_tokens: int) -> list[int]:
    """How much groups that have at least `num_tokens` in common may have, where the least is saved.

    More in common saves more, but from where a group's rest becomes too short to be shared; the most is what the
    sequences of each group have in common.
    """
    beginnings = [group.beginning_tokens for group in groups if group.beginning_tokens]
    most = min(beginnings, default=num_tokens)
    places = {beginning - min_shared_tokens + 1 for beginning in beginnings}
    return [num_tokens, *(place for place in places if num_tokens < place <= most)]


def _saved(groups: Sequence[GroupLengths], num_tokens: int, min_shared_tokens: int) -> tuple[int, int]:
    """Tokens and pairs saved if all groups have `num_tokens` in common and no more, less what they repeat."""
    common_pairs = _causal_pairs(num_tokens)
    tokens, pairs = num_tokens * (len(groups) - 1), common_pairs * (len(groups) - 1)
    for group in groups:
        rest = _repeated_rest(group, num_tokens, min_shared_tokens)
        tokens -= rest * (group.num_sequences - 1)
        pairs -= (_causal_pairs(num_tokens + rest) - common_pairs) * (group.num_sequences - 1)
    return tokens, pairs


def _repeated_rest(group: GroupLengths, num_tokens: int, min_shared_tokens: int) -> int:
    """How many tokens after the first `num_tokens` each sequence of a group may have to repeat."""
    rest = group.beginning_tokens - num_tokens
    if group.unique_tokens == group.total_tokens or rest >= min_shared_tokens:
        return 0
    parts_once = group.total_tokens - group.unique_tokens == group.beginning_tokens * (group.num_sequences - 1)
    return max(rest, 0) if parts_once else min_shared_tokens - 1


def _causal_pairs(num_tokens: int) -> int:
    return num_tokens * (num_tokens + 1) // 2
