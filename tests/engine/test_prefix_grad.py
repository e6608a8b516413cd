"""Constant prompts (prefix_grad=False), against sequences one by one behind a cache without a graph."""

from __future__ import annotations

import functools
from typing import Any

import oracle
import pytest
import torch
from sample_groups import SCENARIOS, five_levels, pairs, tokens
from tiny_models import tiny_model
from torch import nn
from transformers import DynamicCache

import kvpref
from kvpref import Group, Sequence

# Only the order of additions differs; see test_exactness.
FP64_TOLERANCE = 1e-10
SCHEDULES: dict[str, dict[str, Any]] = {
    "full": {},
    "bounded": {"schedule": "bounded"},
    "chunks of 4": {"schedule": "bounded", "max_tokens_per_chunk": 4},
    "checkpointed": {"schedule": "bounded", "max_tokens_per_chunk": 9, "checkpoint": "all"},
}


def begin_alike() -> list[Group]:
    """All responses begin alike, so prompt and beginning are one run of shared tokens; and one response alone."""
    prompt, opening = tokens(6, 1), tokens(2, 2)
    responses = [[*opening, 3 + i, *tokens(3 + i, 3 + i)] for i in range(3)]
    return [
        Group([Sequence.from_prompt_and_response(prompt, response) for response in responses]),
        Group([Sequence.from_prompt_and_response(tokens(5, 9), tokens(4, 10))]),
    ]


def several_turns() -> list[Group]:
    """A question between two scored answers is no prompt: it comes after a scored token."""
    prompt, answer, question = tokens(5, 20), tokens(3, 21), tokens(4, 22)
    flags = [False] * 5 + [True] * 3 + [False] * 4
    ends = [[3 + i, *tokens(2 + i, 23 + i)] for i in range(2)]
    return [Group([Sequence(prompt + answer + question + end, flags + [True] * len(end)) for end in ends])]


CASES = {builder.__name__: builder for builder in (begin_alike, several_turns)} | {
    name: SCENARIOS[name] for name in ("pairs", "story_questions_answers", "five_levels", "one_token_prompts")
}


@functools.cache
def constant_prompts(name: str) -> oracle.Result:
    """Each sequence alone: its prompt in a cache without a graph, and a constant for its first scored token."""
    model = tiny_model("llama", torch.float64)
    shares = []
    with oracle.true_float64():
        for sequence in (sequence for group in CASES[name]() for sequence in group.sequences):
            ids, num_prompt = torch.tensor([sequence.input_ids]), sequence.scored.index(True)
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                prompt = model(input_ids=ids[:, :num_prompt], past_key_values=cache, use_cache=True).logits[0, -1:]
            response = model(input_ids=ids[:, num_prompt:], past_key_values=cache, use_cache=True).logits[0, :-1]
            logps = torch.cat([prompt, response]).log_softmax(-1)
            logps = logps.gather(1, ids[0, num_prompt:, None]).squeeze(1)
            shares.append(logps[torch.tensor(sequence.scored[num_prompt:])])
        token_logps = torch.cat(shares)
        (token_logps * oracle.loss_weights(CASES[name]())).sum().backward()
    return oracle.Result(token_logps.detach(), oracle.grads_of(model))


@functools.cache
def attached() -> nn.Module:
    return kvpref.attach(tiny_model("llama", torch.float64))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_constant_prompts_equal_a_cache_without_a_graph(name: str, schedule: str) -> None:
    batch = kvpref.collate(CASES[name](), min_shared_tokens=1)
    found = oracle.scheduled(attached(), batch, prefix_grad=False, **SCHEDULES[schedule])
    oracle.assert_same(found, constant_prompts(name), FP64_TOLERANCE)


@pytest.mark.parametrize("limits", [{"min_shared_tokens": 16}, {"min_shared_tokens": 1, "max_depth": 1}])
def test_what_is_constant_does_not_depend_on_what_is_shared(limits: dict[str, int]) -> None:
    batch = kvpref.collate(five_levels(), **limits)
    found = oracle.scheduled(attached(), batch, prefix_grad=False)
    oracle.assert_same(found, constant_prompts("five_levels"), FP64_TOLERANCE)


def test_it_is_not_the_gradient() -> None:
    """The log-probs are those of the model; gradients differ by far more than rounding."""
    truth = oracle.naive(tiny_model("llama", torch.float64), pairs())
    found = oracle.scheduled(attached(), kvpref.collate(pairs(), min_shared_tokens=1), prefix_grad=False)
    assert oracle.relative_error(found.token_logps, truth.token_logps) < FP64_TOLERANCE
    name = "model.layers.0.self_attn.v_proj.weight"
    assert oracle.relative_error(found.grads[name], truth.grads[name]) > 1e-2
