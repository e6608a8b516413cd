"""Plans of groups that begin alike: the promises of every plan, clusters in one step, and tokens counted once."""

from __future__ import annotations

from collections import Counter

import pytest
from group_lengths import make_lengths, random_pairs
from hypothesis import given
from hypothesis import strategies as st

from kvpref.data import Clusters, CostModel, PreferenceDataset, StepBatcher, StepOptions, StepSampler, summarize_batches
from kvpref.data.batching.costs import COUNTS, SHARING_MODES
from kvpref.data.batching.dealing import cost_of_runs
from kvpref.data.batching.group_costs import GroupCosts
from kvpref.prefix.building import build_tree
from kvpref.records.groups import Group, Sequence

MIN_SHARED_TOKENS = 3


def make_clusters(of_group: list[int], shared_tokens: int = 5) -> Clusters:
    """Clusters by number, all sharing as many tokens."""
    sizes = Counter(of_group)
    return Clusters(
        of_group=tuple(map(of_group.index, of_group)),
        shared_tokens=tuple(shared_tokens if sizes[cluster] > 1 else 0 for cluster in of_group),
        min_shared_tokens=MIN_SHARED_TOKENS,
    )


@st.composite
def stories(draw: st.DrawFn) -> PreferenceDataset:
    """Groups that may begin with one of a few stories; the rest of a prompt may be too short to share."""
    groups = []
    for number in range(draw(st.integers(1, 30))):
        story = draw(st.integers(0, 5))
        prompt = [story] * draw(st.integers(0, 6)) + [10 + number] * draw(st.integers(1, 4))
        responses = [[100 + index] * draw(st.integers(1, 4)) for index in range(draw(st.integers(1, 3)))]
        groups.append(Group([Sequence.from_prompt_and_response(prompt, response) for response in responses]))
    return PreferenceDataset(groups)


@st.composite
def batchers(draw: st.DrawFn) -> tuple[PreferenceDataset, StepBatcher]:
    dataset = draw(stories())
    mode = draw(st.sampled_from(sorted(COUNTS)))
    largest = max(COUNTS[mode](group)[0] for group in dataset.lengths)
    options = StepOptions(
        groups_per_step=draw(st.integers(1, 12)),
        max_tokens_per_micro_batch=draw(st.none() | st.integers(largest, 4 * largest)),
        mode=mode,
        world_size=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 3)),
        shuffle=draw(st.booleans()),
        window_steps=draw(st.integers(1, 4)),
    )
    clusters = dataset.clusters(options.groups_per_step, MIN_SHARED_TOKENS)
    cost_model = draw(st.none() | st.builds(CostModel, per_pair=st.sampled_from([0.0, 0.3, 5.0])))
    return dataset, StepBatcher(dataset.lengths, options, cost_model=cost_model, clusters=clusters)


def real_groups(step) -> list[int]:
    return [group for rank in step for batch in rank if not batch.is_filler for group in batch.group_indices]


@given(batchers(), st.integers(0, 3))
def test_every_group_is_in_exactly_one_step_of_the_usual_size(case, epoch):
    _, batcher = case
    steps = batcher.steps(epoch)
    assert Counter(group for step in steps for group in real_groups(step)) == Counter(range(len(batcher.lengths)))
    assert len(steps) == batcher.num_steps
    size = batcher.options.groups_per_step
    assert [len(real_groups(step)) for step in steps] == [
        min(size, len(batcher.lengths) - start) for start in range(0, len(batcher.lengths), size)
    ]


@given(batchers(), st.integers(0, 3))
def test_plans_repeat_on_every_rank_and_ranks_have_equal_numbers(case, epoch):
    dataset, batcher = case
    clusters = PreferenceDataset(list(dataset)).clusters(batcher.options.groups_per_step, MIN_SHARED_TOKENS)
    for rank in range(batcher.options.world_size):
        again = StepBatcher(dataset.lengths, batcher.options, cost_model=batcher.costs.cost_model, clusters=clusters)
        sampler = StepSampler(again, rank)
        sampler.set_epoch(epoch)
        assert list(sampler) == [step[rank] for step in batcher.steps(epoch)]
    for step in batcher.steps(epoch):
        assert len({len(rank) for rank in step}) == 1
        if any(batch.is_filler for rank in step for batch in rank):
            assert all(len(batch.group_indices) == 1 for rank in step for batch in rank)


@given(batchers(), st.integers(0, 3))
def test_counted_tokens_keep_the_budget_and_bound_those_of_the_tree(case, epoch):
    dataset, batcher = case
    budget = batcher.options.max_tokens_per_micro_batch
    for step in batcher.steps(epoch):
        for batch in (batch for rank in step for batch in rank):
            tokens = batcher.micro_batch_tokens(batch)
            assert budget is None or tokens <= budget
            if batcher.options.mode in SHARING_MODES:
                groups = [dataset[group] for group in batch.group_indices]
                # A group that shares less than a segment's minimum with itself is beyond the batcher, as ever.
                repeated = sum(
                    (len(group) - 1) * shared
                    for group in groups
                    if (shared := len(common_beginning(group))) < MIN_SHARED_TOKENS
                )
                sequences = [sequence.input_ids for group in groups for sequence in group.sequences]
                tree = build_tree(sequences, min_shared_tokens=MIN_SHARED_TOKENS)
                assert tree.num_unique_tokens <= tokens + repeated


def common_beginning(group: Group) -> list[int]:
    columns = zip(*(sequence.input_ids for sequence in group.sequences), strict=False)
    shared = []
    for column in columns:
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return shared


@given(batchers())
def test_the_steps_groups_depend_on_no_mode_world_size_or_budget(case):
    _, batcher = case
    options = batcher.options
    alone = StepBatcher(
        batcher.lengths,
        StepOptions(
            groups_per_step=options.groups_per_step,
            seed=options.seed,
            shuffle=options.shuffle,
            window_steps=options.window_steps,
        ),
        clusters=batcher.clusters,
    )
    assert [sorted(real_groups(step)) for step in alone.steps(1)] == [
        sorted(real_groups(step)) for step in batcher.steps(1)
    ]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(6, 9), st.integers(0, 3))
def test_a_cluster_that_fits_is_cut_only_where_a_step_or_window_ends(sizes, groups_per_step, epoch):
    of_group = [cluster for cluster, size in enumerate(sizes) for _ in range(size)]
    options = StepOptions(groups_per_step=groups_per_step, window_steps=2)
    batcher = StepBatcher(random_pairs(len(of_group)), options, clusters=make_clusters(of_group))
    steps = batcher.steps(epoch)
    pieces = sum(len({of_group[group] for group in real_groups(step)}) for step in steps)
    # A cut makes one more piece and fills a step or a window.
    assert pieces - len(sizes) <= len(steps) + len(steps) // 2 + 2


def test_clusters_stay_whole_where_single_groups_fill_the_steps():
    # 20 clusters of 5 and 60 single groups, in steps of 8.
    of_group = [group // 5 if group < 100 else group for group in range(160)]
    batcher = StepBatcher(
        random_pairs(160), StepOptions(groups_per_step=8, window_steps=20), clusters=make_clusters(of_group)
    )
    plans = [batcher.steps(epoch) for epoch in (0, 1)]
    for steps in plans:
        for step in steps:
            counts = Counter(of_group[group] for group in real_groups(step))
            assert all(count == 5 for cluster, count in counts.items() if cluster < 20)
    assert plans[0] != plans[1]
    assert plans[0] == batcher.steps(0)


def test_a_cluster_larger_than_a_step_fills_steps_and_changes_from_epoch_to_epoch():
    of_group = [0] * 10 + list(range(10, 40))
    batcher = StepBatcher(random_pairs(40), StepOptions(groups_per_step=4), clusters=make_clusters(of_group))
    cut = [
        sorted(frozenset(g for g in real_groups(step) if g < 10) for step in batcher.steps(epoch)) for epoch in (0, 1)
    ]
    for steps in cut:
        assert sorted(map(len, filter(None, steps))) == [2, 4, 4]
    assert cut[0] != cut[1]


def test_without_shuffling_a_cluster_stands_near_its_first_group():
    lengths = [make_lengths([9]) for _ in range(6)]
    options = StepOptions(groups_per_step=2, shuffle=False)
    batcher = StepBatcher(lengths, options, clusters=make_clusters([0, 1, 2, 1, 4, 5], shared_tokens=0))
    assert [sorted(real_groups(step)) for step in batcher.steps(3)] == [[1, 3], [0, 2], [4, 5]]


@pytest.mark.parametrize(("mode", "num_micro_batches"), [("two_pass", 1), ("one_pass", 1), ("packed", 4)])
def test_the_budget_counts_a_shared_beginning_once_where_the_mode_does(mode, num_micro_batches):
    # Four questions of 2 tokens about a story of 90, with a response of 8 each: 130 tokens together.
    lengths = [make_lengths([8], prompt=92)] * 4
    options = StepOptions(groups_per_step=4, max_tokens_per_micro_batch=130, mode=mode)
    batcher = StepBatcher(lengths, options, clusters=make_clusters([0, 0, 0, 0], shared_tokens=90))
    (step,) = batcher.steps()
    assert len(step[0]) == num_micro_batches
    assert batcher.micro_batch_tokens(step[0][0]) == (130 if num_micro_batches == 1 else 100)
    batches = summarize_batches(batcher)
    assert (batches.num_sharing_groups, batches.largest_cluster) == (4, 4)
    assert batches.costliest_micro_batches_per_step == (130 if num_micro_batches == 1 else 400)


def test_what_remains_of_a_prompt_is_repeated_where_it_is_too_short_to_share():
    # 2 tokens are less than a segment may have: they are there once per response.
    lengths = [make_lengths([8, 8, 8], prompt=92)] * 2
    costs = GroupCosts(lengths, "two_pass", CostModel(), clusters=make_clusters([0, 0], shared_tokens=90))
    assert costs.run_tokens([0, 1]) == 90 + 2 * 3 * (2 + 8)
    assert costs.run_tokens([0]) == 92 + 3 * 8


def test_a_cluster_is_spread_where_ranks_would_wait_for_one_another():
    lengths = [make_lengths([50], prompt=20)] * 4
    clusters = make_clusters([0, 0, 0, 0], shared_tokens=10)
    options = StepOptions(groups_per_step=4, world_size=4)
    (step,) = StepBatcher(lengths, options, clusters=clusters).steps()
    assert [len(batch.group_indices) for rank in step for batch in rank] == [1, 1, 1, 1]
    pair, apart = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    costs = GroupCosts(lengths, "two_pass", CostModel(), clusters=make_clusters([0, 0, 2, 2], shared_tokens=10))
    assert [cost_of_runs(runs, costs, 2, "micro_batch") for runs in (pair, apart)] == [130, 140]
    assert [cost_of_runs(runs, costs, 1, "micro_batch") for runs in (pair, apart)] == [260, 280]


def test_clusters_of_other_groups_are_refused():
    with pytest.raises(ValueError, match="clusters cover 2 groups; there are 3"):
        StepBatcher(random_pairs(3), StepOptions(groups_per_step=1), clusters=make_clusters([0, 0]))
