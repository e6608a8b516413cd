"""The plan of steps: every group once, the same number of micro-batches on every rank, budgets kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from group_lengths import group_lengths, make_lengths, random_pairs
from hypothesis import given
from hypothesis import strategies as st

from kvpref.data import CostModel, GroupLengths, MicroBatch, StepBatcher, StepOptions, StepSampler
from kvpref.data.batching.costs import COUNTS
from kvpref.errors import InputError

WEIGHTS = ("per_pair", "per_scored", "per_micro_batch")


@st.composite
def batchers(draw: st.DrawFn) -> StepBatcher:
    lengths = draw(st.lists(group_lengths, min_size=1, max_size=40))
    mode = draw(st.sampled_from(sorted(COUNTS)))
    largest = max(COUNTS[mode](group)[0] for group in lengths)
    return StepBatcher(
        lengths,
        StepOptions(
            groups_per_step=draw(st.integers(1, 12)),
            max_tokens_per_micro_batch=draw(st.none() | st.integers(largest, 3 * largest)),
            mode=mode,
            world_size=draw(st.integers(1, 5)),
            seed=draw(st.integers(0, 3)),
            shuffle=draw(st.booleans()),
            window_steps=draw(st.integers(1, 4)),
        ),
        cost_model=draw(st.none() | st.builds(CostModel, **dict.fromkeys(WEIGHTS, st.sampled_from([0.0, 0.3, 5.0])))),
    )


def real_groups(step) -> list[int]:
    return [group for rank in step for batch in rank if not batch.is_filler for group in batch.group_indices]


def num_groups(batcher: StepBatcher) -> int:
    return len(batcher.lengths)


@given(batchers(), st.integers(0, 3))
def test_every_group_is_in_exactly_one_step(batcher, epoch):
    steps = batcher.steps(epoch)
    assert Counter(group for step in steps for group in real_groups(step)) == Counter(range(num_groups(batcher)))
    assert len(steps) == batcher.num_steps
    sizes = [len(real_groups(step)) for step in steps]
    assert all(size == batcher.options.groups_per_step for size in sizes[:-1])
    assert 1 <= sizes[-1] <= batcher.options.groups_per_step


@given(batchers(), st.integers(0, 3))
def test_ranks_have_equal_numbers_and_at_most_one_filler_each(batcher, epoch):
    for step in batcher.steps(epoch):
        assert len(step) == batcher.options.world_size
        assert len({len(rank) for rank in step}) == 1
        assert step[0]
        groups = real_groups(step)
        for rank in step:
            assert all(batch.group_indices for batch in rank)
            fillers = [batch for batch in rank if batch.is_filler]
            assert len(fillers) <= 1
            assert not any(batch.is_filler for batch in rank[:-1])
            assert all(len(batch.group_indices) == 1 and batch.group_indices[0] in groups for batch in fillers)
        # A filler is wasted work: only where nothing is left to split.
        if any(batch.is_filler for rank in step for batch in rank):
            assert all(len(batch.group_indices) == 1 for rank in step for batch in rank)


@given(batchers(), st.integers(0, 3))
def test_budgets_are_respected(batcher, epoch):
    budget = batcher.options.max_tokens_per_micro_batch
    counts = COUNTS[batcher.options.mode]
    for step in batcher.steps(epoch):
        for batch in (batch for rank in step for batch in rank):
            lengths = [batcher.lengths[group] for group in batch.group_indices]
            together = GroupLengths(
                *(
                    (max if name == "max_sequence_tokens" else sum)(getattr(group, name) for group in lengths)
                    for name in GroupLengths._fields
                )
            )
            tokens = counts(together)[0]
            # What a group begins with is known of groups alone.
            assert batcher.micro_batch_lengths(batch)._replace(beginning_tokens=0) == together._replace(
                beginning_tokens=0
            )
            assert batcher.micro_batch_tokens(batch) == tokens
            assert batcher.micro_batch_cost(batch) == batcher.costs.cost_model.cost(counts(together))
            assert budget is None or tokens <= budget


@given(batchers(), st.integers(0, 3))
def test_plans_repeat_and_resuming_is_skipping(batcher, epoch):
    again = StepBatcher(list(batcher.lengths), batcher.options, cost_model=batcher.costs.cost_model)
    for done in range(batcher.num_steps + 1):
        assert again.steps(epoch)[done:] == batcher.steps(epoch)[done:]
    for rank in range(batcher.options.world_size):
        sampler = StepSampler(again, rank)
        sampler.set_epoch(epoch)
        assert list(sampler) == [step[rank] for step in batcher.steps(epoch)]
        assert len(sampler) == batcher.num_steps


@given(batchers())
def test_the_steps_groups_do_not_depend_on_world_size_budget_or_mode(batcher):
    # Nor on the cost model. Otherwise a mode could not be checked by its losses being those of another.
    options = batcher.options
    alone = StepBatcher(
        batcher.lengths,
        StepOptions(
            groups_per_step=options.groups_per_step,
            seed=options.seed,
            shuffle=options.shuffle,
            window_steps=options.window_steps,
        ),
    )
    assert [sorted(real_groups(step)) for step in alone.steps(1)] == [
        sorted(real_groups(step)) for step in batcher.steps(1)
    ]


def test_order_changes_with_seed_and_epoch_and_is_fixed_across_machines():
    lengths = random_pairs(40)
    batcher = StepBatcher(lengths, StepOptions(groups_per_step=4, window_steps=2))
    assert batcher.steps(0) != batcher.steps(1)
    assert batcher.steps(0) != StepBatcher(lengths, StepOptions(groups_per_step=4, window_steps=2, seed=1)).steps(0)
    # Constants: a run that is resumed on another machine, or by a later version, must see the same order.
    small = StepBatcher([make_lengths([n + 1]) for n in range(5)], StepOptions(groups_per_step=2, window_steps=1))
    assert [real_groups(step) for step in small.steps(0)] == [[0, 3], [1, 2], [4]]


def test_without_shuffling_windows_keep_the_order_of_the_data():
    lengths = [make_lengths([length]) for length in (9, 3, 7, 1, 8, 2, 6)]
    batcher = StepBatcher(lengths, StepOptions(groups_per_step=2, window_steps=2, shuffle=False))
    assert [real_groups(step) for step in batcher.steps(5)] == [[3, 1], [2, 0], [5, 4], [6]]


def test_incomplete_step_is_last_and_not_made_of_the_longest_groups():
    batcher = StepBatcher(random_pairs(70), StepOptions(groups_per_step=32))
    longest = set(sorted(range(70), key=lambda group: batcher.lengths[group].unique_tokens)[-6:])
    tails = [set(real_groups(batcher.steps(epoch)[-1])) for epoch in range(10)]
    assert all(len(tail) == 6 for tail in tails)
    assert all(tail != longest for tail in tails)
    assert len(set.union(*tails)) > 20


def test_sorting_inside_windows_cuts_padding():
    lengths = random_pairs(512)

    def padded_tokens(window_steps: int) -> int:
        options = StepOptions(groups_per_step=8, mode="padded", window_steps=window_steps)
        batcher = StepBatcher(lengths, options)
        return sum(batcher.micro_batch_tokens(batch) for step in batcher.steps(0) for batch in step[0])

    # Unsorted steps pad to the longest of 8; steps of like lengths should need less than 4/5 of that.
    assert padded_tokens(16) < 0.8 * padded_tokens(1)


def test_the_fewest_micro_batches_that_the_budget_allows_the_costliest_first():
    lengths = [make_lengths([length]) for length in (1, 2, 3, 4, 5, 6)]
    batcher = StepBatcher(
        lengths, StepOptions(groups_per_step=6, max_tokens_per_micro_batch=6, mode="packed", shuffle=False)
    )
    (step,) = batcher.steps()
    assert len(step[0]) == 4  # 21 tokens take at least 4 times 6
    costs = [batcher.micro_batch_cost(batch) for batch in step[0]]
    assert costs == sorted(costs, reverse=True)


def test_costliest_micro_batch_is_split_evenly_between_ranks():
    lengths = [make_lengths([length]) for length in (1, 1, 1, 1, 4)]
    (step,) = StepBatcher(lengths, StepOptions(groups_per_step=5, world_size=2, shuffle=False)).steps()
    assert step == ((MicroBatch((0, 1, 2, 3)),), (MicroBatch((4,)),)) or step == (
        (MicroBatch((4,)),),
        (MicroBatch((0, 1, 2, 3)),),
    )


def test_the_rank_that_did_least_gets_the_costliest_of_a_round():
    lengths = [make_lengths([length]) for length in (3, 4, 5, 6)]
    options = StepOptions(groups_per_step=4, world_size=2, max_tokens_per_micro_batch=6, shuffle=False)
    (step,) = StepBatcher(lengths, options).steps()
    assert step == ((MicroBatch((3,)), MicroBatch((0,))), (MicroBatch((2,)), MicroBatch((1,))))


@pytest.mark.parametrize("mode", sorted(COUNTS))
def test_ranks_are_balanced_by_cost_and_not_by_tokens(mode):
    options = StepOptions(groups_per_step=64, world_size=4, max_tokens_per_micro_batch=1200, mode=mode)
    # Attention alone costs: groups of equal tokens differ by their lengths.
    batcher = StepBatcher(random_pairs(256), options, cost_model=CostModel(per_token=0.0, per_pair=1.0))
    for step in batcher.steps(0):
        loads = [sum(batcher.micro_batch_cost(batch) for batch in rank) for rank in step]
        assert max(loads) <= 1.06 * sum(loads) / len(loads)


def test_fewer_groups_than_ranks_are_filled_with_the_cheapest():
    lengths = [make_lengths([9]), make_lengths([2])]
    (step,) = StepBatcher(lengths, StepOptions(groups_per_step=8, world_size=4)).steps()
    flat = [batch for rank in step for batch in rank]
    assert sorted(flat) == [MicroBatch((0,)), MicroBatch((1,)), MicroBatch((1,), True), MicroBatch((1,), True)]


@pytest.mark.parametrize(("mode", "cost"), [("two_pass", 16), ("one_pass", 16), ("packed", 26), ("padded", 28)])
def test_group_beyond_the_budget_names_group_budget_and_options(mode, cost):
    lengths = [make_lengths([1]), make_lengths([2, 4], prompt=10)]
    StepBatcher(lengths, StepOptions(groups_per_step=1, mode=mode, max_tokens_per_micro_batch=cost))
    options = StepOptions(groups_per_step=1, mode=mode, max_tokens_per_micro_batch=cost - 1)
    with pytest.raises(InputError) as caught:
        StepBatcher(lengths, options, group_ids=["rows.jsonl:1", "rows.jsonl:2"])
    message = str(caught.value)
    assert message.startswith("rows.jsonl:2: ")
    assert f"{cost} tokens" in message
    assert f"{cost - 1};" in message
    assert "raise max_tokens_per_micro_batch" in message
    assert "lower max_prompt_tokens" in message
    with pytest.raises(InputError, match=r"^group 1: "):
        StepBatcher(lengths, options)


def test_no_groups():
    with pytest.raises(InputError, match="no groups"):
        StepBatcher([], StepOptions(groups_per_step=1))


@pytest.mark.parametrize(
    "options",
    [
        {"groups_per_step": 0},
        {"groups_per_step": 1, "world_size": 0},
        {"groups_per_step": 1, "max_tokens_per_micro_batch": 0},
        {"groups_per_step": 1, "window_steps": 0},
        {"groups_per_step": 1, "mode": "three_pass"},
    ],
)
def test_options_are_checked(options):
    with pytest.raises(InputError, match=r"at least 1|two_pass, one_pass, packed, padded"):
        StepOptions(**options)


def test_sampler_checks_its_rank_and_feeds_a_data_loader():
    data = pytest.importorskip("torch.utils.data")
    batcher = StepBatcher(
        random_pairs(10), StepOptions(groups_per_step=4, world_size=2, max_tokens_per_micro_batch=400)
    )
    for rank in (-1, 2):
        with pytest.raises(InputError, match="rank must be from 0 to world_size - 1 = 1"):
            StepSampler(batcher, rank)
    sampler = StepSampler(batcher, 1)
    sampler.set_epoch(2)

    class Identity(data.Dataset):
        def __getitem__(self, micro_batch):
            return micro_batch

    loader = data.DataLoader(Identity(), batch_sampler=sampler, collate_fn=tuple)
    assert list(loader) == [step[1] for step in batcher.steps(2)]
    assert len(loader) == 3


@given(batchers(), st.integers(0, 3), st.data())
def test_groups_that_exceed_the_budget_are_alone_where_that_is_taken(batcher, epoch, data):
    mode = data.draw(st.sampled_from(["two_pass", "one_pass", "packed"]))
    sizes = sorted(COUNTS[mode](group)[0] for group in batcher.lengths)
    budget = data.draw(st.integers(1, sizes[-1]))
    options = replace(batcher.options, mode=mode, max_tokens_per_micro_batch=budget, takes_larger_groups=True)
    batcher = StepBatcher(batcher.lengths, options, cost_model=batcher.costs.cost_model)
    steps = batcher.steps(epoch)
    assert Counter(group for step in steps for group in real_groups(step)) == Counter(range(num_groups(batcher)))
    for step in steps:
        assert len({len(rank) for rank in step}) == 1
        for batch in (batch for rank in step for batch in rank):
            tokens = sum(COUNTS[mode](batcher.lengths[group])[0] for group in batch.group_indices)
            assert batcher.micro_batch_tokens(batch) == tokens
            assert tokens <= budget or len(batch.group_indices) == 1
    assert set(batcher.larger_groups) == {
        group for group, lengths in enumerate(batcher.lengths) if COUNTS[mode](lengths)[0] > budget
    }


def test_a_group_that_exceeds_the_budget_is_refused_with_what_to_do():
    lengths = [make_lengths([3, 4]), make_lengths([30, 40], prompt=100)]
    options = StepOptions(groups_per_step=2, max_tokens_per_micro_batch=169)
    with pytest.raises(InputError, match=r"^b: the group alone takes 170 tokens .* train in schedule bounded"):
        StepBatcher(lengths, options, ["a", "b"])
