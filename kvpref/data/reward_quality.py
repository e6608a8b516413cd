"""How well rewards order responses whose scores are known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from kvpref.records.groups import Group


@dataclass(frozen=True, kw_only=True)
class RewardQuality:
    """How rewards relate to scores, over groups with at least two scored responses."""

    num_pairs: int
    """Pairs of responses to one prompt whose scores differ."""

    pair_accuracy: float | None
    """Share of pairs whose better response has the higher reward, equal rewards counting half; None without pairs."""

    num_groups: int
    """Groups with at least two scored responses."""

    best_of_n_score: float | None
    """Mean over these groups of the score of the response with the highest reward (the mean if there are several)."""

    mean_score: float | None
    """Mean over these groups of their mean score: the expected score of a random response."""

    oracle_score: float | None
    """Mean over these groups of their highest score: the most that choosing can achieve."""


def known_scores(group: Group) -> tuple[float | None, ...]:
    """The scores of a group's responses; labels count as 1 and 0, None is unknown."""
    if group.scores is not None:
        return group.scores
    if group.labels is not None:
        return tuple(map(float, group.labels))
    return (None,) * len(group)


def measure_rewards(groups: Iterable[tuple[Sequence[float], Sequence[float | None]]]) -> RewardQuality:
    """Compare the rewards of each group's responses with their scores.

    Args:
        groups: Per group, the rewards of its responses and their scores, None where unknown.
    """
    num_pairs, right = 0, 0.0
    best, mean, highest = [], [], []
    for rewards, scores in groups:
        rated = [(reward, score) for reward, score in zip(rewards, scores, strict=True) if score is not None]
        if len(rated) < 2:
            continue
        for (first_reward, first), (second_reward, second) in combinations(rated, 2):
            if first != second:
                num_pairs += 1
                difference = (first_reward - second_reward) * (1 if first > second else -1)
                right += 0.5 if difference == 0 else float(difference > 0)
        top = max(reward for reward, _ in rated)
        best.append(_mean([score for reward, score in rated if reward == top]))
        mean.append(_mean([score for _, score in rated]))
        highest.append(max(score for _, score in rated))
    return RewardQuality(
        num_pairs=num_pairs,
        pair_accuracy=right / num_pairs if num_pairs else None,
        num_groups=len(best),
        best_of_n_score=_mean(best) if best else None,
        mean_score=_mean(mean) if mean else None,
        oracle_score=_mean(highest) if highest else None,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
