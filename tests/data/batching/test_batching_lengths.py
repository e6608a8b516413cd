"""The counts that micro-batches are planned by are those of the trees that they run as."""

from __future__ import annotations

import pytest

import kvpref
from kvpref import Group, Sequence
from kvpref.data import PreferenceDataset

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
