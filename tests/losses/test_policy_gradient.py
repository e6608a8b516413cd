"""Policy gradients from given rewards, against their equations and gradients written out."""

from __future__ import annotations

import math

import pytest
import torch
from policy_gradient_equations import (
    CASES,
    MAX_LENGTH,
    SCORES,
    advantages_of,
    expected_loss_and_gradient,
    make,
    token_terms,
)
from scored_groups import assert_same_output, mean_over_units, micro_batches, random_logps, scored_batch, token_lists

import kvpref

# float64 scalars
TOLERANCE = 1e-12


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_equation_with_its_gradient(case: str) -> None:
    batch = scored_batch(SCORES)
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    output = make(case)(policy, reference, batch)
    output.loss.backward()
    loss, gradient = expected_loss_and_gradient(case, batch, policy, reference)
    assert output.loss.item() == pytest.approx(loss, abs=TOLERANCE)
    assert policy.token_logps.grad is not None
    assert policy.token_logps.grad.tolist() == pytest.approx(gradient, abs=TOLERANCE)
    assert not any(value.requires_grad for value in output.metrics.values())


@pytest.mark.parametrize("case", CASES)
def test_the_mean_does_not_depend_on_the_cut_into_micro_batches(case: str) -> None:
    batch, loss = scored_batch(SCORES), make(case, entropy_coef=0.2)
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    policy = policy._replace(entropy=random_logps(batch, 2).token_logps.abs())
    parts = micro_batches(batch, [policy, reference])
    outputs = [loss(own, ref, part) for part, own, ref in parts]
    found = mean_over_units(outputs, [loss.num_units(part) for part, _, _ in parts])
    assert_same_output(found, loss(policy, reference, batch), TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_the_first_update_has_ratios_of_one(case: str) -> None:
    batch = scored_batch(SCORES)
    policy = random_logps(batch, 0)
    _, gradient = expected_loss_and_gradient(case, batch, policy, policy, beta=0.0)
    output = make(case, old="policy", beta=0.0)(policy, None, batch)
    output.loss.backward()
    assert policy.token_logps.grad is not None
    assert policy.token_logps.grad.tolist() == pytest.approx(gradient, abs=TOLERANCE)
    assert output.metrics["ratio_mean"].item() == pytest.approx(1, abs=TOLERANCE)
    assert not make(case, old="policy", beta=0.0).needs_reference


@pytest.mark.parametrize("case", CASES)
def test_a_response_without_scored_tokens_contributes_nothing(case: str) -> None:
    batch = scored_batch([(0.0, 1.0)])
    silent = kvpref.Sequence((1, 2), (False, False))
    group = batch.groups[0]
    batch = kvpref.collate([kvpref.Group([silent, *group.sequences], scores=[1.0, 0.0, 1.0])])
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    output = make(case)(policy, reference, batch)
    output.loss.backward()
    assert policy.token_logps.grad is not None
    assert torch.isfinite(policy.token_logps.grad).all()
    assert all(math.isfinite(value) for value in (output.loss.detach(), *output.metrics.values()))
    # The others' part of it, with the silent response in their baseline.
    name, settings = CASES[case]
    scale = settings.get("scale_rewards", "none" if name in ("dr_grpo", "rloo") else "group")
    advantages = advantages_of([1.0, 0.0, 1.0], name, scale)
    pi, ref = token_lists(policy), token_lists(reference)
    total = 0.0
    for row in (1, 2):
        log_ratios = [a - b for a, b in zip(pi[row], ref[row], strict=True)]
        share = {"tokens": 1.0, "sequences": 1 / len(pi[row])}[make(case).unit]
        share = 1 / MAX_LENGTH if name == "dr_grpo" else share
        for t in range(len(pi[row])):
            total += share * token_terms(name, settings, advantages[row], pi[row][t], log_ratios, t)[0]
    units = policy.token_logps.numel() if make(case).unit == "tokens" else 3
    assert output.loss.item() == pytest.approx(total / units, abs=TOLERANCE)


def test_groups_that_do_not_count_give_zero_with_a_gradient_of_zero() -> None:
    batch, loss = scored_batch([(1.0, 1.0), (0.0,)]), make("dapo dynamic")
    policy = random_logps(batch, 0)
    output = loss(policy, random_logps(batch, 1), batch)
    output.loss.backward()
    assert (output.loss.item(), loss.num_units(batch)) == (0, 0)
    assert policy.token_logps.grad is not None
    assert (policy.token_logps.grad == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_impossible_responses_give_no_infinity(case: str) -> None:
    # In float32 exp(100) is infinite, and an infinite ratio times an advantage of 0 is not a number.
    batch = scored_batch([(1.0, 1.0), (0.0, 1.0)])
    policy, reference = random_logps(batch, 0), random_logps(batch, 1, scale=400.0)
    for own, other in ((policy, reference), (reference, policy)):
        own = own._replace(token_logps=own.token_logps.detach().float().requires_grad_())
        output = make(case)(own, other._replace(token_logps=other.token_logps.detach().float()), batch)
        output.loss.backward()
        assert math.isfinite(output.loss.detach())
        assert own.token_logps.grad is not None
        assert torch.isfinite(own.token_logps.grad).all()
