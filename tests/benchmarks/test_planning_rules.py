"""The rules that planning is compared with are rules: every group once, within the budget, as many as ranks need."""

from __future__ import annotations

from pathlib import Path

import pytest
from group_lengths import random_pairs

from kvpref.data import CostModel, PreferenceDataset, StepOptions, StepPlanner
from kvpref.data.batching.cutting import GroupCosts
from kvpref.records.groups import Group, Sequence

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODES = ("two_pass", "packed", "padded")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [1, 3])
def test_rules_keep_groups_budgets_and_ranks(mode, world_size, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import planning_rules

    costs = GroupCosts(random_pairs(30), mode, CostModel(per_pair=0.5), budget=1200)
    for rule in planning_rules.RULES_OF_MODE[mode]:
        runs = planning_rules.RULES[rule](range(30), costs, world_size)
        assert sorted(group for run in runs for group in run) == list(range(30)), rule
        assert all(costs.run_tokens(run) <= 1200 for run in runs), rule
        assert len(runs) % world_size == 0, rule


@pytest.mark.parametrize("mode", MODES)
def test_the_last_rule_of_a_mode_is_what_the_planner_does(mode, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import planning_rules

    options = StepOptions(groups_per_step=16, world_size=2, mode=mode, max_tokens_per_micro_batch=1200)
    lengths = random_pairs(60)
    ruled = planning_rules.planner_with(planning_rules.RULES_OF_MODE[mode][-1])
    assert ruled(lengths, options).steps() == StepPlanner(lengths, options).steps()


def test_stories_with_questions_take_fewer_tokens_together(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import planning_sharing

    prompts = [[story] * 100 + [question] * 20 for question in range(100, 104) for story in range(16)]
    groups = [Group([Sequence.from_prompt_and_response(prompt, [1, 2])]) for prompt in prompts]
    rows = list(planning_sharing.compare_sharing({"made up": PreferenceDataset(groups)}, CostModel()))
    apart, together = rows[:2]
    # Steps of 16 groups: four stories with their four questions each.
    assert together["tokens_per_step"] == 4 * 100 + 16 * 22
    assert together["micro_batch_tokens"] == 4 * together["tokens_per_step"]
    assert apart["tokens_per_step"] > together["tokens_per_step"]
    assert [row["together"] for row in rows] == [False, True, False, True]
    assert together["num_sharing_groups"] == 64
    assert planning_sharing.sharing_table(rows).row_count == 4
