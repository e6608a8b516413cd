"""Rewards against known scores, by hand."""

from __future__ import annotations

import pytest

from kvpref.data.reward_quality import known_scores, measure_rewards
from kvpref.records.groups import Group, Sequence

SEQUENCES = [Sequence([1, 2], [False, True])] * 3


def test_accuracy_counts_pairs_with_different_scores_and_halves_ties():
    # Group 1: of 3 pairs one has equal scores, one is right, one is tied in reward. Group 2: one pair, wrong.
    quality = measure_rewards([([3.0, 1.0, 1.0], [1.0, 1.0, 0.0]), ([0.0, 5.0], [0.9, 0.2])])
    assert quality.num_pairs == 3
    assert quality.pair_accuracy == pytest.approx((1 + 0.5 + 0) / 3)


def test_best_of_n_against_the_mean_and_the_best():
    quality = measure_rewards([([3.0, 1.0, 1.0], [0.6, 0.9, 0.0]), ([2.0, 2.0], [0.4, 0.2])])
    assert quality.best_of_n_score == pytest.approx((0.6 + 0.3) / 2)
    assert quality.mean_score == pytest.approx((0.5 + 0.3) / 2)
    assert quality.oracle_score == pytest.approx((0.9 + 0.4) / 2)


def test_unrated_responses_and_groups_with_one_rated_response_are_left_out():
    quality = measure_rewards([([9.0, 1.0, 2.0], [None, 1.0, 0.0]), ([1.0, 2.0], [1.0, None])])
    assert (quality.num_groups, quality.num_pairs, quality.pair_accuracy) == (1, 1, 0.0)
    assert quality.best_of_n_score == 0.0


def test_nothing_to_compare_with():
    quality = measure_rewards([([1.0, 2.0], [None, None])])
    assert (quality.num_groups, quality.pair_accuracy, quality.best_of_n_score) == (0, None, None)


def test_scores_of_a_group_are_its_scores_or_its_labels():
    assert known_scores(Group(SEQUENCES, scores=[1, None, 0.5])) == (1, None, 0.5)
    assert known_scores(Group(SEQUENCES[:2], labels=[True, False])) == (1.0, 0.0)
    assert known_scores(Group(SEQUENCES)) == (None, None, None)
