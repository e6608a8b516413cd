"""Rotary embeddings that depend on the length: exact on one side of the threshold, refused across it."""

from __future__ import annotations

import random
from typing import Any

import oracle
import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model
from torch import nn

import kvpref
from kvpref import Group, Sequence, UnsupportedModelError

THRESHOLD = 16
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 6,
    "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
    "factor": 4.0,
    "original_max_position_embeddings": THRESHOLD,
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
RUNS = [{"mode": "two_pass"}, {"mode": "one_pass"}, {"mode": "packed", "checkpoint": "all"}, {"mode": "padded"}]
BOUNDED = {"schedule": "bounded", "max_tokens_per_chunk": 6, "checkpoint": "all"}


def groups_of(*lengths: tuple[int, tuple[int, ...]]) -> list[Group]:
    draw = random.Random(5)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, VOCAB_SIZE) for _ in range(count)]

    groups = []
    for prompt_tokens, responses in lengths:
        prompt = tokens(prompt_tokens)
        groups.append(Group([Sequence.from_prompt_and_response(prompt, tokens(count)) for count in responses]))
    return groups


SHORT = groups_of((8, (4, 7)), (5, (3, 1)))
LONG = groups_of((9, (8, 12)), (20, (1, 3)))


def model_with(rope: dict[str, Any]) -> nn.Module:
    overrides = {} if rope is LONGROPE else {"max_position_embeddings": THRESHOLD}
    return tiny_model("llama", torch.float64, rope_parameters=rope, **overrides)


@pytest.mark.parametrize("options", [*RUNS, BOUNDED], ids=str)
@pytest.mark.parametrize(
    ("rope", "groups"), [(LONGROPE, SHORT), (LONGROPE, LONG), (DYNAMIC, SHORT)], ids=["short", "long", "dynamic"]
)
def test_one_side_of_the_threshold_is_exact(rope: dict[str, Any], groups: list[Group], options: dict[str, Any]) -> None:
    model = model_with(rope)
    truth = oracle.naive(oracle.twin(model), groups)
    batch = kvpref.collate(groups, min_shared_tokens=1)
    found = oracle.scheduled(kvpref.attach(model), batch, **options)
    oracle.assert_same(found, truth, 1e-7)  # the frequencies themselves are float32


def test_the_long_frequencies_matter() -> None:
    plain = oracle.naive(model_with({**LONGROPE, "long_factor": [1.0] * 6}), LONG)
    assert oracle.relative_error(plain.token_logps, oracle.naive(model_with(LONGROPE), LONG).token_logps) > 1e-4


def test_the_model_is_as_before_after_long_batches() -> None:
    model = model_with(LONGROPE)
    truth = oracle.naive(oracle.twin(model), SHORT)
    kvpref.attach(model)
    kvpref.response_logps(model, kvpref.collate(LONG, min_shared_tokens=1))
    oracle.assert_same(oracle.shared(model, kvpref.collate(SHORT, min_shared_tokens=1)), truth, 1e-7)


@pytest.mark.parametrize("options", [*RUNS, BOUNDED], ids=str)
def test_both_sides_are_refused_naming_sequences(options: dict[str, Any]) -> None:
    model = kvpref.attach(model_with(LONGROPE))
    batch = kvpref.collate(groups_of((8, (4, 7)), (10, (3, 9))), min_shared_tokens=1)
    with pytest.raises(
        UnsupportedModelError,
        match=r"sequence 1 of group 1 holds 19 tokens and sequence 0 of group 0 12.*one side of 16",
    ):
        oracle.scheduled(model, batch, **options)


def test_dynamic_over_the_threshold_is_refused() -> None:
    model = kvpref.attach(model_with(DYNAMIC))
    with pytest.raises(UnsupportedModelError, match=r"sequence 1 of group 1 holds 23 tokens, and rope type 'dynamic'"):
        kvpref.response_logps(model, kvpref.collate(LONG, min_shared_tokens=1))


def test_micro_batches_of_one_step_are_checked_together() -> None:
    """They share passes over what their prompts have in common."""
    from kvpref.engine.options import EngineOptions
    from kvpref.engine.schedules import forward_backward_step
    from kvpref.plan.step import join_batches

    model = kvpref.attach(model_with(LONGROPE))
    step = join_batches([kvpref.collate(SHORT), kvpref.collate(LONG)], max_tokens_per_chunk=8)
    options = EngineOptions(schedule="bounded", max_tokens_per_chunk=8)
    with pytest.raises(UnsupportedModelError, match="one side of 16"):
        forward_backward_step(
            model,
            step,
            oracle.weighted_loss,
            options,
            references=[None, None],
            backward=lambda loss, _: loss.backward(),
        )
