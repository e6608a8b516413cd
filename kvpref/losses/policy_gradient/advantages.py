"""Advantages of the responses of a group relative to one another."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvpref.losses.scores import RatedResponses

STD_FLOOR = 1e-4
"""Added to the standard deviation that advantages are divided by, as TRL does."""


def _mean_baseline(rated: RatedResponses) -> torch.Tensor:
    return (rated.scores.sum(dim=1) / rated.rated.sum(dim=1))[:, None].expand_as(rated.scores)


def _leave_one_out_baseline(rated: RatedResponses) -> torch.Tensor:
    others = rated.rated.sum(dim=1, keepdim=True) - 1
    baseline = (rated.scores.sum(dim=1, keepdim=True) - rated.scores) / others.clamp(min=1)
    # A single response is its own baseline: no advantage.
    return torch.where(others > 0, baseline, rated.scores)


BASELINES: dict[str, Callable[[RatedResponses], torch.Tensor]] = {
    "mean": _mean_baseline,
    "leave_one_out": _leave_one_out_baseline,
}
"""The baseline that each response's score is compared with, (num_groups, N): the mean of the rated responses of its
group, or of the others."""

SCALES = ("group", "none")
"""What advantages are divided by: the standard deviation of the group's scores, or nothing. The batch's is not offered:
it would depend on the cut into micro-batches."""


def group_advantages(rated: RatedResponses, *, baseline: str, scale: str) -> torch.Tensor:
    """Score minus baseline, divided by the scale; (num_groups, N) float64, 0 where not rated.

    Args:
        rated: The scores.
        baseline: One of `BASELINES`.
        scale: One of `SCALES`.
    """
    differences = rated.scores - BASELINES[baseline](rated)
    if scale == "group":
        differences = differences / (score_deviations(rated) + STD_FLOOR)[:, None]
    return differences.where(rated.rated, 0)


def score_deviations(rated: RatedResponses) -> torch.Tensor:
    """Standard deviation (of a sample: N - 1) of each group's scores, (num_groups,) float64; 0 for a single one."""
    squares = ((rated.scores - _mean_baseline(rated)) ** 2).where(rated.rated, 0)
    return (squares.sum(dim=1) / (rated.rated.sum(dim=1) - 1).clamp(min=1)).sqrt()
