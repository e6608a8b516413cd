"""Responses of several token rows, in every mode and schedule, against each row alone."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from sample_groups import tokens
from tiny_models import tiny_model

import kvpref
from kvpref import Group, Sequence
from kvpref.plan.modes import MODES
from kvpref.plan.passes import Reads

TOLERANCE = 1e-10  # float64 sums in another order
OPTIONS: dict[str, dict[str, Any]] = {
    **{mode: {"mode": mode} for mode in MODES},
    "bounded": {"schedule": "bounded", "max_tokens_per_chunk": 5},
}


def attempt(prompt: list[int], seed: int, *, rewritten: bool) -> Sequence:
    """Two turns; rewritten, the history of the second one lacks the first two tokens of the first, its thinking."""
    thinking, answer, question, last = (tokens(length, seed + length) for length in (2, 3, 4, 5))
    first = Sequence(prompt + thinking + answer, [False] * len(prompt) + [True] * 5)
    history = prompt + (answer if rewritten else thinking + answer) + question
    if rewritten:
        return Sequence(history + last, [False] * len(history) + [True] * 5, earlier=[first])
    return Sequence(history + last, [*first.scored, *[False] * 4, *[True] * 5])


def groups() -> list[Group]:
    prompt = tokens(18, 1)
    attempts = [attempt(prompt, seed, rewritten=seed != 30) for seed in (10, 30, 50)]
    alone = attempt(tokens(6, 90), 70, rewritten=True)
    return [Group(attempts, scores=[1.0, 0.0, 0.5], id="made:1"), Group([alone], scores=[1.0], id="made:2")]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_part_is_scored_as_alone(name: str) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    truth = oracle.naive(oracle.twin(model), groups())
    found = oracle.scheduled(kvpref.attach(model), kvpref.collate(groups()), **OPTIONS[name])
    oracle.assert_same(found, truth, TOLERANCE)


def test_a_response_has_the_scored_tokens_of_its_parts() -> None:
    batch = kvpref.collate(groups())
    model = kvpref.attach(tiny_model("llama", dtype=torch.float64))
    with torch.no_grad():
        logps = kvpref.response_logps(model, batch)
    assert logps.lengths().tolist() == [10, 10, 10, 10]
    assert logps.sum().shape == (4,)
    assert batch.num_unique_tokens < batch.num_total_tokens


def test_rewards_are_read_at_the_end_of_the_last_part() -> None:
    reads = Reads(kind="ends")
    without = [
        Group([Sequence(sequence.ids, sequence.flags) for sequence in group.sequences], group.scores)
        for group in groups()
    ]
    for batch in (kvpref.collate(groups(), reads=reads), kvpref.collate(groups()).reading(reads)):
        plan, expected = batch.plan("two_pass"), kvpref.collate(without, reads=reads).plan("two_pass")
        assert torch.equal(plan.token_index, expected.token_index)
        assert len(batch.parts) == len(batch.sequences) == 4
