"""How good each response of a batch is, as tensors; shared by losses over any number of responses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeVar

import torch

from kvpref.errors import InputError
from kvpref.losses.interface import Idle, PreferenceLoss
from kvpref.plan.batch import Batch
from kvpref.plan.columns import turn_numbers
from kvpref.records.groups import Group

T = TypeVar("T")

EQUAL_SCORES = Idle(
    # Also true of a prompt with one response, or one rated response: `select` may already have left out the others.
    "no two responses have different scores",
    "give each prompt at least two responses with different scores",
)


class RatedResponses(NamedTuple):
    """The scores of a batch, one row per group, padded to the N responses of the largest group.

    Attributes:
        rows: (num_groups, N) int64, the index of each response among the batch's sequences; 0 where there is none.
        rated: (num_groups, N) bool, whether the response exists and has a score.
        scores: (num_groups, N) float64, so that no two different scores become equal; 0 where not rated.
        places: (num_sequences,) int64, the place of each of the batch's sequences in the flattened rows.
    """

    rows: torch.Tensor
    rated: torch.Tensor
    scores: torch.Tensor
    places: torch.Tensor

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """(num_sequences,) values arranged by group, (num_groups, N); arbitrary where not rated."""
        return values[self.rows]

    def better(self) -> torch.Tensor:
        """(num_groups, N, N) bool: whether response i is scored higher than response j; False if either is unrated."""
        both = self.rated[:, :, None] & self.rated[:, None, :]
        return both & (self.scores[:, :, None] > self.scores[:, None, :])

    def to_sequences(self, values: torch.Tensor) -> torch.Tensor:
        """(num_groups, N) values back in the batch's order, (num_sequences,); 0 where not rated."""
        return values.where(self.rated, 0).flatten()[self.places]


TURN_SCORES = "turn_scores"
"""The column of scores by turn: a list per response with one number per turn, or null."""


def known_scores(group: Group) -> tuple[float | None, ...] | None:
    """The scores of a group's responses; if there are none, the sums of their turns' scores, if any.

    Raises:
        InputError: If the column `TURN_SCORES` is read and does not hold one number per turn.
    """
    if TURN_SCORES not in group.columns or any(score is not None for score in group.scores or ()):
        return group.scores
    (rows,) = turn_numbers([group], TURN_SCORES)
    return tuple(None if row is None else float(row.sum()) for row in rows)


def response_scores(group: Group) -> tuple[float | None, ...]:
    """A score per response, or None where unrated: `known_scores`, else 1 and 0 for the group's labels.

    Raises:
        InputError: If no response has a score or label.
    """
    scores = known_scores(group)
    if scores is not None and any(score is not None for score in scores):
        return scores
    if group.labels is not None:
        return tuple(float(label) for label in group.labels)
    raise InputError(
        f"{group.id}: no response has a score or a label; this loss needs `scores` (trajectories: a `score` "
        "in each), or chosen and rejected"
    )


def rated_indices(group: Group) -> list[int]:
    """Which responses of a group have a score, at least one.

    Raises:
        InputError: If none has.
    """
    return [index for index, score in enumerate(response_scores(group)) if score is not None]


def has_preference(group: Group) -> bool:
    """Whether two responses of a group have different scores."""
    return len(set(response_scores(group)) - {None}) > 1


def check_not_ranks(group: Group, loss: str) -> None:
    """Refuse ranks, for losses that read how good a response is by itself, or that change if all scores rise equally.

    Raises:
        InputError: If only the order of the group's responses is known.
    """
    if group.ranks is not None:
        raise InputError(
            f"{group.id}: {loss} reads how good each response is by itself, and ranks say only which one is better; "
            "give `scores` in place of `ranks`, or use a loss that compares: all_pairs, plackett_luce or grpo; "
            "bradley_terry or plackett_luce_reward for reward models"
        )


def rated_responses(batch: Batch) -> RatedResponses:
    """The scores of a batch as tensors on its device.

    Raises:
        InputError: If a group has no rated response.
    """
    return batch.tensors(_rated_responses)


def _rated_responses(groups: Sequence[Group]) -> RatedResponses:
    scores = [response_scores(group) for group in groups]
    starts = [0, *accumulate(map(len, groups))]
    rows = [list(range(start, stop)) for start, stop in pairwise(starts)]
    rated = [[score is not None for score in row] for row in scores]
    numbers = [[score or 0.0 for score in row] for row in scores]
    width = max(map(len, groups))
    return RatedResponses(
        rows=torch.tensor(_padded(rows, width, 0)),
        rated=torch.tensor(_padded(rated, width, False)),
        scores=torch.tensor(_padded(numbers, width, 0.0), dtype=torch.float64),
        places=torch.tensor([width * row + column for row, group in enumerate(groups) for column in range(len(group))]),
    )


def _padded(rows: list[list[T]], width: int, filler: T) -> list[list[T]]:
    return [[*row, *[filler] * (width - len(row))] for row in rows]


class ComparesScores(PreferenceLoss):
    """Base of the losses that compare responses with different scores: a mean over groups that have any."""

    def group_units(self, group: Group) -> int:
        """1 for a group with two different scores."""
        return int(has_preference(group))

    def idle(self, group: Group) -> Idle | None:
        return None if has_preference(group) else EQUAL_SCORES

    def select(self, group: Group) -> Group:
        """The rated responses; just one if all have the same score, because then there is nothing to learn."""
        rated = rated_indices(group)
        return group.take(rated if has_preference(group) else rated[:1])

    def prepare_batch(self, batch: Batch) -> None:
        super().prepare_batch(batch)
        rated_responses(batch)
