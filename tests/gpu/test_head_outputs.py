"""Entropies, hidden states, values, logits and rewards on CUDA beside float64 on the CPU, each sequence alone."""

from __future__ import annotations

from typing import Any

import odd_heads
import oracle
import pytest
import torch
from oracle_outputs import naive_outputs, naive_rewards
from sample_groups import five_levels, pairs
from tiny_models import tiny_model, tiny_reward_model

import kvpref
from kvpref import HeadOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
HEAD = HeadOptions(
    temperature=0.7, entropy=True, collision=True, mean_logits=True, hidden=True, values=True, logit_ids=(7, 3, 90)
)
SCHEDULES: dict[str, dict[str, Any]] = {"full": {}, "bounded": {"schedule": "bounded", "max_tokens_per_chunk": 5}}


def with_value_head(dtype: torch.dtype, *, softcapped: bool) -> torch.nn.Module:
    model = tiny_model("mistral", dtype)  # head dim 16: the kernel needs a multiple of 8
    if softcapped:
        model = odd_heads.with_logits(odd_heads.softcapped, dtype, family="mistral")
        model.config.final_logit_softcapping = 2.0
    head = kvpref.add_value_head(model)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, head.in_features))
    return model


def run(model: torch.nn.Module, loss: Any, **options: Any) -> dict[str, torch.Tensor]:
    batch = kvpref.collate(five_levels() + pairs(), min_shared_tokens=1, device=DEVICE)
    kvpref.forward_backward(model, batch, loss, **options)
    return oracle.grads_of(model)


def assert_near(found: torch.Tensor, truth: torch.Tensor, tolerance: float, name: str) -> None:
    assert oracle.relative_error(found.cpu(), truth.detach()) <= tolerance, name


# float32: some hundred additions in another order, TF32 off by default. bfloat16: 8 bits through two layers.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("softcapped", [False, True])
@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_head_outputs(dtype: torch.dtype, tolerance: float, options: dict[str, Any], softcapped: bool) -> None:
    exact = with_value_head(torch.float64, softcapped=softcapped)
    with oracle.precision(exact):
        truth = naive_outputs(exact, kvpref.collate(five_levels() + pairs()), HEAD)
    seen: dict[str, torch.Tensor] = {}

    def loss(policy: kvpref.ResponseLogps, reference: None, batch: kvpref.Batch) -> torch.Tensor:
        seen.update({name: getattr(policy, name).detach() for name in truth})
        assert policy.entropy is not None
        return policy.token_logps.mean() + policy.entropy.mean()

    loss.head = HEAD  # type: ignore[attr-defined]
    grads = run(kvpref.attach(with_value_head(dtype, softcapped=softcapped).to(DEVICE)), loss, **options)
    for name, values in truth.items():
        assert_near(seen[name], values, tolerance, name)
    (truth["token_logps"].mean() + truth["entropy"].mean()).backward()
    for name, grad in oracle.grads_of(exact).items():
        if grad.norm() > 1e-3:  # some vanish but for rounding
            assert_near(grads[name], grad, 4 * tolerance, name)


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_rewards(options: dict[str, Any]) -> None:
    exact = tiny_reward_model("mistral", torch.float64)
    with oracle.precision(exact):
        truth = naive_rewards(exact, kvpref.collate(five_levels() + pairs())).rewards
    seen: list[torch.Tensor] = []

    @kvpref.loss(reads="ends")
    def loss(policy: kvpref.ResponseRewards, reference: None, batch: kvpref.Batch) -> torch.Tensor:
        seen.append(policy.rewards.detach())
        return policy.rewards.square().mean()

    grads = run(kvpref.attach(tiny_reward_model("mistral").to(DEVICE)), loss, **options)
    assert_near(seen[0], truth, 1e-4, "rewards")
    truth.square().mean().backward()
    for name, grad in oracle.grads_of(exact).items():
        if grad.norm() > 1e-3:
            assert_near(grads[name], grad, 1e-3, name)
