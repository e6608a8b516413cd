"""Extra columns of the data as tensors on the host: one number per sequence, or per scored token."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from typing import Any

import torch

from kvpref.errors import InputError
from kvpref.records.groups import Group


def column_values(groups: AbstractSequence[Group], name: str) -> list[Any]:
    """The value of each group, as it stands in the data.

    Raises:
        InputError: If a group has no such column; the message names it.
    """
    for group in groups:
        if name not in group.columns:
            has = ", ".join(group.columns) or "none"
            raise InputError(f"{group.id}: no column {name!r}; this group's extra columns: {has}")
    return [group.columns[name] for group in groups]


def sequence_numbers(groups: AbstractSequence[Group], name: str) -> torch.Tensor:
    """A number per sequence, (num_sequences,) float32; a group's single number is each sequence's.

    Raises:
        InputError: If a group has no such column, or it holds something else than one number per sequence.
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


def token_numbers(groups: AbstractSequence[Group], name: str) -> torch.Tensor:
    """A number per scored token, (num_scored_tokens,) float32.

    Raises:
        InputError: If a group has no such column, a response's list has another length than its scored tokens, or holds
            something else than numbers.
    """
    numbers: list[float] = []
    for group, value in zip(groups, column_values(groups, name), strict=True):
        rows = value if group.is_per_sequence(value) else [value] * len(group)
        for index, (row, sequence) in enumerate(zip(rows, group.sequences, strict=True)):
            num_scored = sum(sequence.scored)
            if not isinstance(row, list | tuple) or len(row) != num_scored:
                found = f"{len(row)}" if isinstance(row, list | tuple) else f"{row!s:.60}"
                raise InputError(
                    f"{group.id}: column {name!r} must hold one number per scored token of response {index} "
                    f"({num_scored}); found {found}"
                )
            others = [item for item in row if not isinstance(item, int | float)]
            if others:
                raise InputError(
                    f"{group.id}: column {name!r} must hold one number per scored token of response {index}; "
                    f"found {others[0]!r:.60}"
                )
            numbers.extend(map(float, row))
    return torch.tensor(numbers)
