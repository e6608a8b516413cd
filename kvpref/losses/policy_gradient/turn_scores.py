"""Advantages from scores by turn: each turn of a response is judged by itself, as in process supervision."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from typing import NamedTuple

import numpy as np
import torch

from kvpref.errors import InputError
from kvpref.losses.interface import Idle
from kvpref.losses.policy_gradient.advantages import STD_FLOOR
from kvpref.losses.scores import TURN_SCORES
from kvpref.plan.columns import FloatArray, turn_lengths, turn_numbers
from kvpref.records.groups import Group

EQUAL_TURN_SCORES = Idle("no two turns have different scores", "give turns of each prompt scores that differ")


class TurnAdvantages(NamedTuple):
    """The advantages of a batch with scores by turn.

    Attributes:
        advantages: (S,) float64, per scored token; 0 in responses without scores.
        rewards: (num_sequences,) float64, the sum of the scores of a response's turns; 0 without scores.
        deviations: (num_sequences,) float64, standard deviation of all turns' scores in the response's group.
        are_equal: (num_sequences,) float64, 1 where all those scores are equal.
    """

    advantages: torch.Tensor
    rewards: torch.Tensor
    deviations: torch.Tensor
    are_equal: torch.Tensor


def turn_advantages(groups: AbstractSequence[Group], scale: str) -> TurnAdvantages:
    """The advantage of a token is the sum of the normalised scores of its turn and of all later ones.

    Section 4.1.3 of Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), a turn for a reasoning step: scores are
    normalised by the mean and the standard deviation of the scores of all turns of all responses of the group.

    Args:
        groups: Groups with a column `TURN_SCORES`.
        scale: One of `kvpref.losses.policy_gradient.advantages.SCALES`; ``none`` only subtracts the mean.

    Raises:
        InputError: If a group has no such column, or no response of it has scores, or not one for each turn.
    """
    advantages: list[FloatArray] = []
    of_responses: list[tuple[float, float, float]] = []
    for group in groups:
        rows, scores = _scores_of(group)
        deviation = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
        divisor = deviation + STD_FLOOR if scale == "group" else 1.0
        for row, sequence in zip(rows, group.sequences, strict=True):
            own = np.zeros(len(turn_lengths(sequence))) if row is None else (row - scores.mean()) / divisor
            advantages.append(own[::-1].cumsum()[::-1].repeat(turn_lengths(sequence)))
            total = 0.0 if row is None else float(row.sum())
            of_responses.append((total, deviation, float(_are_equal(scores))))
    columns = torch.tensor(of_responses, dtype=torch.float64).unbind(1)
    return TurnAdvantages(torch.from_numpy(np.concatenate(advantages)), *columns)


def turns_differ(group: Group) -> bool:
    """Whether two turns of a group have different scores."""
    return not _are_equal(_scores_of(group)[1])


def scored_by_turn(group: Group) -> list[int]:
    """The responses of a group whose turns have scores, at least one."""
    return [index for index, row in enumerate(_scores_of(group)[0]) if row is not None]


def _scores_of(group: Group) -> tuple[list[FloatArray | None], FloatArray]:
    """The scores of each response's turns, and all of them in one array."""
    (rows,) = turn_numbers([group], TURN_SCORES)
    known = [row for row in rows if row is not None]
    if not known:
        raise InputError(f"{group.id}: no response has scores by turn in {TURN_SCORES!r}; give one number per turn")
    return rows, np.concatenate(known)


def _are_equal(scores: FloatArray) -> bool:
    return bool((scores == scores[:1]).all())
