"""What groups are counted to compute, against the plans that run."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpref.data import CostModel, measure_group, work_of
from kvpref.data.batching.costs import COUNTS
from kvpref.data.batching.lengths import combine
from kvpref.errors import InputError
from kvpref.plan.batch import collate
from kvpref.plan.flops import AttentionShape, ModelShape, Work, count_work
from kvpref.prefix.rules import Rule
from kvpref.records.groups import Group, Sequence

LAYERS = AttentionShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, value_dim=8)
SHAPE = ModelShape(linear_weights=1000, attention=(LAYERS,), hidden_size=32, vocab_size=101)


@st.composite
def groups_that_share_their_beginnings_only(draw: st.DrawFn) -> list[Group]:
    """Prompts that differ in their first token, responses that differ in the token after what all share."""
    groups = []
    for index in range(draw(st.integers(1, 4))):
        generator = random.Random(draw(st.integers(0, 999)))
        shared = [1000 + index, *(generator.randrange(50) for _ in range(draw(st.integers(0, 20))))]
        sequences = []
        for branch, own in enumerate(draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))):
            tokens = [*shared, *([2000 + branch] * min(own, 1)), *(generator.randrange(50) for _ in range(own - 1))]
            # Scored from anywhere on: inside the shared beginning, or, as with truncated prompts, at unequal places.
            start = draw(st.integers(1, len(tokens)))
            sequences.append(Sequence(tokens, [position >= start for position in range(len(tokens))]))
        groups.append(Group(sequences))
    return groups


@pytest.mark.parametrize("mode", sorted(COUNTS))
@given(groups=groups_that_share_their_beginnings_only())
def test_work_of_a_micro_batch_is_what_its_plan_runs(mode, groups):
    lengths = combine(map(measure_group, groups))
    assert work_of(lengths, mode) == count_work(collate(groups, min_shared_tokens=1).plan(mode))


SMALL_GROUPS = st.lists(
    st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=8), min_size=1, max_size=4), min_size=1, max_size=3
)


@given(SMALL_GROUPS)
def test_a_tree_that_shares_more_runs_less(token_lists):
    groups = [Group([Sequence(tokens, [False] + [True] * (len(tokens) - 1)) for tokens in one]) for one in token_lists]
    counted = work_of(combine(map(measure_group, groups)), "two_pass")
    run = count_work(collate(groups, min_shared_tokens=1).plan("two_pass"))
    assert all(real <= bound for real, bound in zip(run, counted, strict=True))


def test_counts_by_hand():
    # Prompt of 3, then 1 2 and 1 4 5: four tokens are shared, the first response token scored once.
    group = Group([Sequence.from_prompt_and_response([7, 8, 9], tail) for tail in ([1, 2], [1, 4, 5])])
    lengths = measure_group(group)
    assert work_of(lengths, "two_pass") == Work(4 + 1 + 2, 10 + 5 + (5 + 6), 1 + 1 + 2)
    assert work_of(lengths, "packed") == Work(11, 15 + 21, 5)
    assert work_of(lengths, "padded") == Work(12, 2 * 36, 5)


def test_costs_of_a_shape_are_its_flops():
    model = CostModel.from_shape(SHAPE)
    work = Work(123, 4567, 89)
    assert model.unit == "FLOPs"
    assert model.cost(work) == SHAPE.flops(work).total


@pytest.mark.parametrize(("rule", "reach"), [(Rule("window", 6), 6.0), (Rule("chunk", 6), 3.0)])
def test_layers_that_see_less_cost_no_more_than_all_pairs_and_than_their_reach(rule, reach):
    shape = replace(SHAPE, attention=(LAYERS, replace(LAYERS, num_layers=6, rule=rule)))
    model = CostModel.from_shape(shape)
    assert model.cost((10, 20, 5)) == shape.flops(Work(10, 20, 5, ((rule, 20),))).total
    long = model.cost((100, 5000, 5))
    assert long == shape.flops(Work(100, 5000, 5, ((rule, int(reach * 100)),))).total
    padded = CostModel.from_shape(shape, "padded")  # computes what it masks
    assert padded.cost((100, 5000, 5)) == shape.flops(Work(100, 5000, 5, ((rule, 5000),))).total


def test_cost_is_a_weighted_sum_and_tokens_by_default():
    model = CostModel(per_token=2.0, per_pair=0.5, per_scored=3.0, per_micro_batch=7.0, unit="seconds")
    assert model.cost((10, 4, 2)) == 20 + 2 + 6 + 7
    assert CostModel().cost((10, 4, 2)) == 10


@pytest.mark.parametrize("weights", [{"per_pair": -1.0}, {"per_token": float("nan")}, {"per_token": 0.0}])
def test_weights_are_checked(weights):
    with pytest.raises(InputError, match="at least 0 and not all 0"):
        CostModel(**weights)


def test_planning_imports_no_torch():
    code = (
        "import sys\n"
        "from kvpref.data import CostModel, GroupLengths, StepOptions, StepBatcher\n"
        "batcher = StepBatcher([GroupLengths(3, 4, 2, 2, 5, 6, 2, 2)], StepOptions(groups_per_step=1))\n"
        "batcher.micro_batch_cost(batcher.steps()[0][0][0])\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
