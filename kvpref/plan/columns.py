"""Extra columns of the data as numbers on the host: one per sequence, per turn, or per scored token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvpref.errors import InputError
from kvpref.records.groups import Group, Sequence

FloatArray = npt.NDArray[np.float64]


def column_values(groups: AbstractSequence[Group], name: str) -> list[Any]:
    """The value of each group, unchanged.

    Raises:
        InputError: If a group has no such column; the message names it.
    """
    for group in groups:
        if name not in group.columns:
            has = ", ".join(group.columns) or "none"
            raise InputError(f"{group.id}: no column {name!r}; this group's extra columns: {has}")
    return [group.columns[name] for group in groups]


def sequence_numbers(groups: AbstractSequence[Group], name: str) -> torch.Tensor:
    """One number per sequence, (num_sequences,) float32; a group's single number goes to each sequence.

    Raises:
        InputError: If a group has no such column, or it does not hold one number per sequence.
    """
    numbers: list[float] = []
    for group, value in zip(groups, column_values(groups, name), strict=True):
        values = value if group.is_per_sequence(value) else [value] * len(group)
        if not all(isinstance(item, int | float) for item in values):
            raise InputError(
                f"{group.id}: column {name!r} must hold a number, or one per response; found {value!s:.60}"
            )
        numbers.extend(map(float, values))
    return torch.tensor(numbers)


def token_weights(groups: AbstractSequence[Group]) -> torch.Tensor:
    """`Sequence.weights` of all scored tokens, (num_scored_tokens,) float64; 1 in sequences without weights."""
    parts = [part for group in groups for part in group.parts]
    rows = [np.ones(part.num_scored) if part.weights is None else np.array(part.weights) for part in parts]
    return torch.from_numpy(np.concatenate(rows))


def token_numbers(groups: AbstractSequence[Group], name: str) -> torch.Tensor:
    """One number per scored token, (num_scored_tokens,) float32.

    A response's list has one number per scored token, or one per turn (a run of scored tokens, over its parts in
    order), which then applies to each of the turn's tokens.

    Raises:
        InputError: If a group has no such column, or a response's list matches neither its scored tokens nor its turns
            in length, or does not hold numbers.
    """
    return _numbers(groups, name, _by_token_or_turn)


def exact_token_numbers(groups: AbstractSequence[Group], name: str) -> torch.Tensor:
    """Like `token_numbers`, for values that cannot be one number per turn, such as log-probs."""
    return _numbers(groups, name, _by_token)


def spread_numbers(groups: AbstractSequence[Group], name: str) -> torch.Tensor:
    """Like `token_numbers`, but a single number of a response or its group applies to all of the response's tokens."""
    return _numbers(groups, name, _by_any)


def turn_numbers(groups: AbstractSequence[Group], name: str) -> list[list[FloatArray | None]]:
    """Per group and response, one number per turn, (num_turns,) float64; None for a response whose entry is null.

    Raises:
        InputError: If a group has no such column, or a response's entry does not hold one number per turn.
    """
    return [
        [None if entry.value is None else _by_turn(entry) for entry in _entries(group, name)]
        for group in _having(groups, name)
    ]


def turn_lengths(sequence: Sequence) -> npt.NDArray[np.int64]:
    """Scored tokens of each turn of a response, over its parts in order, (num_turns,)."""
    turns = [turn for part in sequence.parts for turn in part.turns]
    return np.array([stop - first for first, stop in turns], dtype=np.int64)


class _Entry(NamedTuple):
    """The value of a column for one response."""

    column: str
    """The column's name in messages."""

    number: int
    """The response's number in its group."""

    value: Any
    sequence: Sequence

    def numbers(self, lengths: Mapping[str, int], begin: str = "one number") -> FloatArray:
        """The list as (n,) float64, if it has one of these lengths (keyed by what each number stands for)."""
        found: Any = f"{self.value!s:.60}"
        if isinstance(self.value, list | tuple | np.ndarray):
            values = _as_array(self.value)
            if values is not None and len(values) in lengths.values():
                return values
            others = [] if values is not None else [item for item in self.value if not isinstance(item, int | float)]
            found = f"{others[0]!r:.60}" if others else len(self.value)
        wanted = "".join(f", or one per {unit} ({length})" for unit, length in lengths.items())
        wanted = wanted.removeprefix(", or one per ") + ("," if len(lengths) > 1 else "")
        raise InputError(f"{self.column} must hold {begin} per {wanted} of response {self.number}; found {found}")


def _as_array(values: Any) -> FloatArray | None:
    """A list of numbers as (n,) float64; None for anything else."""
    try:
        found = np.asarray(values)
    except ValueError:  # lists of several lengths
        return None
    if found.ndim != 1 or not (found.dtype.kind in "biuf" or all(isinstance(item, int | float) for item in values)):
        return None
    return found.astype(np.float64)


def _entries(group: Group, name: str) -> Iterator[_Entry]:
    """The entries of all responses; a value of the group goes to each."""
    value = group.columns[name]
    values = value if group.is_per_sequence(value) else [value] * len(group)
    for index, (own, sequence) in enumerate(zip(values, group.sequences, strict=True)):
        yield _Entry(f"{group.id}: column {name!r}", index, own, sequence)


def _having(groups: AbstractSequence[Group], name: str) -> AbstractSequence[Group]:
    column_values(groups, name)
    return groups


def _numbers(groups: AbstractSequence[Group], name: str, of_response: Callable[[_Entry], FloatArray]) -> torch.Tensor:
    rows = [of_response(entry) for group in _having(groups, name) for entry in _entries(group, name)]
    return torch.from_numpy(np.concatenate(rows)).float()


def _by_token(entry: _Entry) -> FloatArray:
    return entry.numbers({"scored token": entry.sequence.total_scored})


def _by_turn(entry: _Entry) -> FloatArray:
    return entry.numbers({"turn": len(turn_lengths(entry.sequence))})


def _by_token_or_turn(entry: _Entry, begin: str = "one number") -> FloatArray:
    num_tokens, lengths = entry.sequence.total_scored, turn_lengths(entry.sequence)
    values = entry.numbers({"scored token": num_tokens, "turn": len(lengths)}, begin)
    return values if len(values) == num_tokens else values.repeat(lengths)


def _by_any(entry: _Entry) -> FloatArray:
    if isinstance(entry.value, int | float):
        return np.full(entry.sequence.total_scored, float(entry.value))
    return _by_token_or_turn(entry, "a number, or one")
