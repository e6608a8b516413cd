"""The two responses of a group that differ most in score, for losses that compare two."""

from __future__ import annotations

from kvpref.data.reading.trajectories.attempts import TURN_SCORES
from kvpref.records.groups import Group


def best_and_worst(group: Group) -> Group | None:
    """The group with only its best and its worst response, the first of equals; None if no two scores differ.

    If no response has a score, the sum over its turns counts.
    """
    scores = _scores(group)
    rated = [index for index, score in enumerate(scores) if score is not None]
    if not rated:
        return None
    best = max(rated, key=lambda index: scores[index] or 0.0)
    worst = min(rated, key=lambda index: scores[index] or 0.0)
    return None if scores[best] == scores[worst] else group.take(sorted((best, worst)))


def _scores(group: Group) -> list[float | None]:
    if any(score is not None for score in group.scores or ()):
        return list(group.scores or ())
    by_turn = group.columns.get(TURN_SCORES) or [None] * len(group)
    return [None if scores is None else sum(scores) for scores in by_turn]
