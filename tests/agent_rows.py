"""Padded rows as agents leave them: calls whose histories nest, attempts that branch, turns with tools between."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from sample_groups import tokens

Row = tuple[list[int], list[int]]
"""Token ids, and 1 for those that the policy wrote."""


def _row(*spans: tuple[list[int], int]) -> Row:
    return [token for ids, _ in spans for token in ids], [flag for ids, flag in spans for _ in ids]


def calls_that_nest() -> list[Row]:
    """One attempt of four turns as a row per model call, the last turn scored; each holds the one before."""
    rows, history = [], tokens(20, 1)
    for turn in range(4):
        response = tokens(3 + turn, 10 + turn)
        rows.append(_row((history, 0), (response, 1)))
        history = [*history, *response, *tokens(18 - turn, 20 + turn)]
    return [rows[index] for index in (2, 0, 3, 1)]  # in no order


def attempts_that_branch() -> list[Row]:
    """Whole attempts at a task that part at different turns, one of them twice, and one of another task."""
    task, first, second = tokens(21, 1), tokens(6, 2), tokens(4, 3)
    tool, answer = tokens(17, 4), tokens(5, 5)
    return [
        _row((task, 0), (first, 1), (tool, 0), (second, 1), (answer, 0)),
        _row((task, 0), (first, 1), (tool, 0), (tokens(7, 6), 1)),
        _row((tokens(30, 7), 0), (tokens(2, 8), 1)),
        _row((task, 0), (tokens(9, 9), 1), (tokens(3, 10), 0), (tokens(1, 11), 1)),
        _row((task, 0), (first, 1), (tool, 0), (tokens(7, 6), 1)),
    ]


def some_without_responses() -> list[Row]:
    """Rows of which no token is scored, among others; one shares its prompt."""
    prompt = tokens(19, 1)
    return [_row((prompt, 0), (tokens(4, 2), 1)), _row((prompt, 0), (tokens(6, 3), 0)), _row((tokens(3, 4), 0))]


def alone() -> list[Row]:
    """Rows that share nothing."""
    return [_row((tokens(5 + 4 * index, index), 0), (tokens(6 - index, 30 + index), 1)) for index in range(4)]


KINDS: dict[str, Callable[[], list[Row]]] = {
    kind.__name__: kind for kind in (calls_that_nest, attempts_that_branch, some_without_responses, alone)
}


def padded(rows: Sequence[Row], side: str = "right") -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and response_mask, (B, L) int64; `side` is left, right or both."""
    width = max(len(ids) for ids, _ in rows) + 3
    names = ("input_ids", "attention_mask", "response_mask")
    made = {name: torch.zeros(len(rows), width, dtype=torch.int64) for name in names}
    for index, (ids, flags) in enumerate(rows):
        free = width - len(ids)
        start = {"right": 0, "left": free, "both": (index + 1) % (free + 1)}[side]
        for name, values in zip(names, (ids, [1] * len(ids), flags), strict=True):
            made[name][index, start : start + len(ids)] = torch.tensor(values)
    return made
