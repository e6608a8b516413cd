"""Statistics of trajectories, and what sharing their histories saves."""

from __future__ import annotations

from dataclasses import dataclass

from kvpref.data.dataset import PreferenceDataset
from kvpref.data.summaries import LengthSummary, summarize


@dataclass(frozen=True, kw_only=True)
class TrajectoryStatistics:
    """The trajectories of a dataset; other groups count if they have several turns."""

    num_tasks: int
    """Groups."""

    num_trajectories: int
    """Responses of all groups."""

    trajectories_per_task: LengthSummary
    """Responses per group."""

    turns_per_trajectory: LengthSummary
    """Scored turns per response."""

    scored_tokens_per_trajectory: LengthSummary
    """Tokens of those turns."""

    scored_tokens: int
    """Scored tokens of all responses."""

    call_tokens: int
    """Tokens of one row per model call, each with the history and the turn."""

    trajectory_tokens: int
    """Tokens of whole trajectories, counting each row of a response separately."""

    unique_tokens: int
    """Tokens of the tasks' prefix trees: what runs if tasks share nothing among them."""

    passes_per_task: LengthSummary
    """Levels of the tasks' prefix trees, each a pass of the model in mode ``two_pass``."""

    call_saving: float
    """call_tokens / unique_tokens."""

    trajectory_saving: float
    """trajectory_tokens / unique_tokens."""


def summarize_trajectories(dataset: PreferenceDataset) -> TrajectoryStatistics | None:
    """Measure the trajectories of a dataset; None if it has none.

    Builds the prefix tree of every group.
    """
    if dataset.report is None or not dataset.report.num_trajectories:
        return None
    from kvpref.plan.batch import collate  # imports torch

    sizes, turns, scored, levels = [], [], [], []
    call_tokens = trajectory_tokens = unique_tokens = 0
    for group in dataset:
        sizes.append(len(group))
        for sequence in group.sequences:
            stops = [stop for part in sequence.parts for _, stop in part.turns]
            turns.append(len(stops))
            scored.append(sequence.total_scored)
            call_tokens += sum(stops)
            trajectory_tokens += sum(map(len, sequence.parts))
        tree = collate([group]).tree
        levels.append(tree.num_levels)
        unique_tokens += tree.num_unique_tokens
    return TrajectoryStatistics(
        num_tasks=len(sizes),
        num_trajectories=sum(sizes),
        trajectories_per_task=summarize(sizes),
        turns_per_trajectory=summarize(turns),
        scored_tokens_per_trajectory=summarize(scored),
        scored_tokens=sum(scored),
        call_tokens=call_tokens,
        trajectory_tokens=trajectory_tokens,
        unique_tokens=unique_tokens,
        passes_per_task=summarize(levels),
        call_saving=call_tokens / unique_tokens,
        trajectory_saving=trajectory_tokens / unique_tokens,
    )
