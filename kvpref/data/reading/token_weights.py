"""Weights of scored tokens, from the column `token_weights` to `Sequence.weights`."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any

from kvpref.data.reading.messages import RowError, type_name
from kvpref.data.reading.trajectories.attempts import TOKEN_WEIGHTS
from kvpref.records.groups import Group, Sequence


def has_token_weights(value: object) -> bool:
    """Whether a decoded row, or a trajectory in it, has the column."""
    if not isinstance(value, dict):
        return False
    items = value.get("trajectories")
    rows = [value, *(items if isinstance(items, list) else ())]
    return any(isinstance(row, dict) and row.get(TOKEN_WEIGHTS) is not None for row in rows)


def with_token_weights(group: Group) -> Group:
    """The group with its column `token_weights` as weights of its sequences; unchanged if it has no such column.

    An entry is a number for all of the response's tokens, a list with one number per turn or per scored token over the
    response's parts in order, or null for 1 each.

    Raises:
        RowError: If there is not one entry per response, an entry has a wrong length, or it holds anything but
            finite numbers of at least 0.
    """
    if TOKEN_WEIGHTS not in group.columns:
        return group
    entries = group.columns[TOKEN_WEIGHTS]
    if not group.is_per_sequence(entries):
        raise RowError(f"`{TOKEN_WEIGHTS}` must be a list with one entry for each of the {len(group)} responses")
    return Group(
        [
            sequence if entry is None else _weighted(sequence, _by_token(sequence, entry, f"{TOKEN_WEIGHTS}[{index}]"))
            for index, (sequence, entry) in enumerate(zip(group.sequences, entries, strict=True))
        ],
        scores=None if group.ranks is not None else group.scores,
        ranks=group.ranks,
        labels=group.labels,
        id=group.id,
        columns={name: value for name, value in group.columns.items() if name != TOKEN_WEIGHTS},
    )


def _weighted(sequence: Sequence, weights: list[float]) -> Sequence:
    parts = sequence.parts
    ends = accumulate((part.num_scored for part in parts), initial=0)
    own = [weights[first:stop] for first, stop in pairwise(ends)]
    earlier = [
        Sequence(part.ids, part.flags, part.images, given) for part, given in zip(parts[:-1], own[:-1], strict=True)
    ]
    return Sequence(sequence.ids, sequence.flags, sequence.images, own[-1], earlier)


def _by_token(sequence: Sequence, entry: Any, name: str) -> list[float]:
    """A weight for each scored token of all parts."""
    if not isinstance(entry, list):
        return [_parse(entry, name)] * sequence.total_scored
    values = [_parse(value, f"{name}[{index}]") for index, value in enumerate(entry)]
    lengths = [stop - first for part in sequence.parts for first, stop in part.turns]
    if len(values) == sum(lengths):
        return values
    if len(values) == len(lengths):
        return [value for value, length in zip(values, lengths, strict=True) for _ in range(length)]
    raise RowError(
        f"`{name}` has {len(values)} entries; expected a number, one per turn ({len(lengths)}), or one per scored "
        f"token ({sum(lengths)})"
    )


def _parse(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"`{name}` must be a number, found {type_name(value)}")
    if not 0 <= value < math.inf:
        raise RowError(f"`{name}` is {value}; expected a finite number of at least 0")
    return float(value)
