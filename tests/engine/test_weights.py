"""Tokens with weights in every mode and schedule, against each sequence alone with the weighted sums written out."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from oracle_outputs import naive_outputs
from sample_groups import tokens
from tiny_models import tiny_model

import kvpref
from kvpref import Batch, Group, LossOutput, ResponseLogps, Sequence
from kvpref.plan.modes import MODES

TOLERANCE = 1e-10  # float64 sums in another order
OPTIONS: dict[str, dict[str, Any]] = {
    **{mode: {"mode": mode} for mode in MODES},
    "bounded": {"schedule": "bounded", "max_tokens_per_chunk": 5},
}
HEAD = kvpref.HeadOptions(entropy=True)
COEFFICIENTS = torch.tensor([1.0, -2.0, 0.7, 1.3, 0.4], dtype=torch.float64)  # so that no error cancels


def trajectories() -> list[Group]:
    """Attempts that share their first turn, which two score with other weights, one without and one not at all."""
    trunk = tokens(6, 1) + tokens(4, 2) + tokens(3, 3)
    scored = [False] * 6 + [True] * 4 + [False] * 3
    unscored = [False] * len(trunk)

    def attempt(length: int, flags: list[bool], weights: list[float] | None) -> Sequence:
        return Sequence(trunk + tokens(length, 10 + length), flags + [True] * length, weights=weights)

    attempts = [
        attempt(3, scored, [0.5, 2.0, 0.0, 1.25, 1.0, 3.0, 0.1]),
        attempt(5, scored, [0.3, 0.1, 1.7, 0.9, 0.0, 0.0, 2.0, 1.0, 0.6]),
        attempt(2, scored, None),
        attempt(4, unscored, [1.5, 0.2, 0.0, 0.8]),
    ]
    plain = Sequence.from_prompt_and_response(tokens(5, 30), tokens(3, 31))
    return [Group(attempts, id="made:1"), Group([plain], id="made:2")]


def loss(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
    assert policy.entropy is not None
    means = policy.mean_of(policy.token_logps.square() + policy.entropy)
    return LossOutput((COEFFICIENTS * (policy.sum() + means)).sum(), {})


def written_out(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    found = naive_outputs(model, batch, HEAD)
    lengths = [sum(sequence.scored) for sequence in batch.sequences]
    total = torch.zeros((), dtype=torch.float64)
    for sequence, coefficient, logps, entropy in zip(
        batch.sequences,
        COEFFICIENTS,
        found["token_logps"].split(lengths),
        found["entropy"].split(lengths),
        strict=True,
    ):
        weights = torch.tensor(sequence.weights or [1.0] * len(logps), dtype=torch.float64)
        mean = (weights * (logps.square() + entropy)).sum() / weights.sum()
        total = total + coefficient * ((weights * logps).sum() + mean)
    return total


@pytest.mark.parametrize("option", OPTIONS)
def test_a_shared_token_counts_once_per_sequence_by_that_ones_weight(option: str) -> None:
    model, batch = tiny_model("llama", torch.float64), kvpref.collate(trajectories(), min_shared_tokens=1)
    assert batch.num_unique_tokens < batch.num_total_tokens
    with oracle.precision(model):
        expected = written_out(model, batch)
        expected.backward()
    grads = oracle.grads_of(model)
    model.zero_grad()
    kvpref.attach(model)
    with oracle.precision(model):
        output = kvpref.forward_backward(model, batch, kvpref.loss(entropy=True)(loss), **OPTIONS[option])
    assert output.loss.item() == pytest.approx(expected.item(), rel=TOLERANCE)
    for name, grad in oracle.grads_of(model).items():
        assert oracle.relative_error(grad, grads[name]) < TOLERANCE, name
