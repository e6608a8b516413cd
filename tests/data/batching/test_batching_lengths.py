"""The counts that micro-batches are planned by are those of the trees that they run as."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import kvpref
from kvpref import Group, Sequence
from kvpref.data import PreferenceDataset, measure_group, work_of
from kvpref.data.batching.lengths import SharingLimits, combine_sharing
from kvpref.plan.flops import count_work
from kvpref.plan.passes import Reads
from kvpref.plan.sharing import Sharing

MIN_SHARED = 16


def group(num_prompt: int, num_responses: int) -> Group:
    """Responses of two to four tokens that differ from the first token on."""
    prompt = list(range(10, 10 + num_prompt))
    responses = [[100 + index] * (2 + index % 3) for index in range(num_responses)]
    return Group([Sequence.from_prompt_and_response(prompt, response) for response in responses])


@pytest.mark.parametrize("num_responses", [1, 2, 9])
@pytest.mark.parametrize("num_prompt", [1, MIN_SHARED - 1, MIN_SHARED, 40])
@pytest.mark.parametrize("max_depth", [None, 0, 1])
def test_what_is_too_short_to_be_shared_counts_in_every_sequence(
    num_prompt: int, num_responses: int, max_depth: int | None
) -> None:
    one = group(num_prompt, num_responses)
    (planned,) = PreferenceDataset([one]).batching_lengths(MIN_SHARED, max_depth)
    batch = kvpref.collate([one], min_shared_tokens=MIN_SHARED, max_depth=max_depth)
    assert planned.unique_tokens == batch.num_unique_tokens
    shares = num_prompt >= MIN_SHARED and max_depth != 0 and num_responses > 1
    assert (planned.unique_tokens < planned.total_tokens) == shares
    assert (planned.unique_pairs < planned.total_pairs) == shares


@st.composite
def trajectories(draw: st.DrawFn) -> Group:
    """Token lists that part anywhere, end inside one another or are the same."""
    rows = draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=6))
    flags = [draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row))) for row in rows]
    return Group([Sequence([7, *row], [False, *own]) for row, own in zip(rows, flags, strict=True)])


LIMITS = st.tuples(st.integers(1, 4), st.sampled_from([None, 0, 1, 2]))


@given(trajectories(), LIMITS)
def test_the_counts_of_a_group_are_those_of_its_tree(one: Group, limits: tuple[int, int | None]) -> None:
    batch = kvpref.collate([one], min_shared_tokens=limits[0], max_depth=limits[1])
    assert work_of(measure_group(one, SharingLimits(*limits)), "two_pass") == count_work(batch.plan("two_pass"))


@given(trajectories(), LIMITS)
def test_the_counts_for_layers_with_states_are_those_of_their_tree(one: Group, limits: tuple[int, int | None]) -> None:
    sharing = Sharing(min_shared_tokens=limits[0], max_depth=limits[1]).under(Reads(states=True))
    counted = measure_group(one, SharingLimits(*limits, whole_segments=True))
    assert counted.unique_tokens == sharing.tree(one.parts).num_unique_tokens


def rows(*texts: str) -> Group:
    """Sequences of digits; scored are those before a comma."""
    return Group(
        [
            Sequence(
                [int(digit) for digit in text if digit != ","],
                [text[place + 1 : place + 2] == "," for place, digit in enumerate(text) if digit != ","],
            )
            for text in texts
        ]
    )


# What the groups have in common beyond the prompt leaves too little of a group's own beginning to be shared.
@example(
    [rows("70"), rows("70000000", "7100000", "7101"), rows("700000", "70,000000", "700000", "70,0100")], (3, None), 0
)
@example(
    [rows("70"), rows("70000000000", "70001"), rows("71,", "7000000", "7100100000000", "71,0000000000000")],
    (4, None),
    0,
)
@given(st.lists(trajectories(), min_size=2, max_size=3), LIMITS, st.integers(0, 4))
def test_the_counts_of_groups_that_begin_alike_bound_those_of_their_tree(
    groups: list[Group], limits: tuple[int, int | None], more: int
) -> None:
    min_shared, max_depth = limits
    if max_depth == 0:
        max_depth = 3  # no group shares anything with another then
    dataset = PreferenceDataset([_behind([9] * (min_shared + more), group) for group in groups])
    counted = combine_sharing(dataset.batching_lengths(min_shared, max_depth), min_shared + more, min_shared)
    if max_depth == 1:
        return  # prompts of groups share nothing then
    batch = kvpref.collate(list(dataset), min_shared_tokens=min_shared, max_depth=max_depth)
    run = count_work(batch.plan("two_pass"))
    assert all(real <= bound for real, bound in zip(run[:3], work_of(counted, "two_pass")[:3], strict=True))


def _behind(prompt: list[int], group: Group) -> Group:
    """The group with a prompt before every part."""

    return Group(
        [
            Sequence(prompt + sequence.ids.tolist(), [False] * len(prompt) + sequence.flags.tolist())
            for sequence in group.sequences
        ]
    )


@given(trajectories(), st.data())
def test_earlier_turns_count_as_the_rows_that_run(rows: Group, data: st.DataObject) -> None:
    last = data.draw(st.integers(0, len(rows) - 1))
    part = rows.sequences[last]
    joined = Sequence(part.ids, part.flags, earlier=rows.sequences[:last])
    assert measure_group(Group([joined, *rows.sequences[last + 1 :]])) == measure_group(rows)
