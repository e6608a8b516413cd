"""Rewards and their gradients against the forward of transformers' own reward models on each sequence alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from oracle_outputs import naive_rewards
from sample_groups import SCENARIOS
from tiny_models import FAMILIES, tiny_model, tiny_reward_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import kvpref
from kvpref import Batch, Group, LossOutput, ResponseRewards, Sequence
from kvpref.engine.passes import response_rewards
from kvpref.plan.modes import MODES

REWARD_FAMILIES = tuple(name for name in FAMILIES if name != "granite")  # transformers has no reward model of it
TOLERANCE = 1e-10  # float64 sums in another order; 1e-14 measured
PAD = 0


def weights_of(num_sequences: int) -> torch.Tensor:
    return torch.randn(num_sequences, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@kvpref.loss(reads="ends")
def weighted_rewards(policy: ResponseRewards, reference: None, batch: Batch) -> LossOutput:
    """Couples all rewards, so that a gradient in the wrong place shows."""
    weights = weights_of(batch.num_sequences).to(policy.rewards)
    return LossOutput((policy.rewards * weights).sum() + policy.rewards.square().mean(), {})


def naive(model: PreTrainedModel, groups: list[Group]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rewards and gradients of the untouched model, each sequence in a batch of one."""
    model.zero_grad(set_to_none=True)
    with oracle.precision(model):
        batch = kvpref.collate(groups)
        policy = naive_rewards(model, batch)
        weighted_rewards(policy, None, batch).loss.backward()
    return policy.rewards.detach(), oracle.grads_of(model)


def run(model: PreTrainedModel, groups: list[Group], **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    seen: list[torch.Tensor] = []

    @kvpref.loss(reads="ends")
    def spying(policy: ResponseRewards, reference: None, batch: Batch) -> LossOutput:
        seen.append(policy.rewards.detach())
        return weighted_rewards(policy, reference, batch)

    model.zero_grad(set_to_none=True)
    with oracle.precision(model):
        kvpref.forward_backward(model, kvpref.collate(groups, min_shared_tokens=1), spying, **options)
    return seen[0], oracle.grads_of(model)


def assert_same(found: tuple[Any, Any], truth: tuple[Any, Any], tolerance: float = TOLERANCE) -> None:
    assert oracle.relative_error(found[0], truth[0]) <= tolerance
    assert found[1].keys() == truth[1].keys()
    for name in truth[1]:
        assert oracle.relative_error(found[1][name], truth[1][name]) <= tolerance, name


OPTIONS: dict[str, dict[str, Any]] = {
    **{mode: {"mode": mode} for mode in MODES},
    "bounded": {"schedule": "bounded", "max_tokens_per_chunk": 4},
    "bounded whole": {"schedule": "bounded"},
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scenarios(scenario: str, options: dict[str, Any]) -> None:
    groups = SCENARIOS[scenario]()
    model = tiny_reward_model("llama", torch.float64)
    truth = naive(model, groups)
    assert_same(run(kvpref.attach(model), groups, **options), truth)


@pytest.mark.parametrize("family", REWARD_FAMILIES)
@pytest.mark.parametrize("schedule", ["full", "bounded"])
def test_families(family: str, schedule: str) -> None:
    groups = SCENARIOS["pairs"]()
    model = tiny_reward_model(family, torch.float64)
    truth = naive(model, groups)
    assert_same(run(kvpref.attach(model), groups, schedule=schedule), truth)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_padding_tokens_at_the_end_are_passed_over(options: dict[str, Any]) -> None:
    """As transformers does, which takes them for padding; the reward is then read inside the prompt, even."""
    prompt = [5, 6, 7, 8]
    endings = ([9, PAD], [9, PAD, PAD], [9, 10], [PAD], [PAD, PAD, PAD], [11, PAD, 12])
    groups = [Group([Sequence.from_prompt_and_response(prompt, ending) for ending in endings])]
    model = tiny_reward_model("llama", torch.float64)
    assert model.config.pad_token_id == PAD
    truth = naive(model, groups)
    found = run(kvpref.attach(model), groups, **options)
    assert_same(found, truth)
    assert found[0][0] == pytest.approx(found[0][1].item(), rel=1e-12), "both are read at token 9"


def test_saved_models_are_transformers_own(tmp_path: Path) -> None:
    model = kvpref.attach(tiny_reward_model("qwen2")).eval()
    groups = SCENARIOS["shared_system_prompt"]()
    with torch.no_grad():
        rewards = response_rewards(model, kvpref.collate(groups, min_shared_tokens=1)).rewards
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    rows = [sequence.input_ids for group in groups for sequence in group.sequences]
    width = max(map(len, rows))
    input_ids = torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        padded = loaded(input_ids=input_ids, attention_mask=mask).logits.squeeze(-1)
    # float32, two ways to one sum
    assert (padded - rewards).abs().max() <= 1e-5 * rewards.abs().max()


def test_a_loss_and_a_model_that_do_not_fit_are_refused() -> None:
    batch = kvpref.collate(SCENARIOS["pairs"]())
    language_model, reward_model = kvpref.attach(tiny_model("llama")), kvpref.attach(tiny_reward_model("llama"))
    with pytest.raises(kvpref.InputError, match="rewards need a model with a scalar head; LlamaForCausalLM has none"):
        kvpref.forward_backward(language_model, batch, weighted_rewards)
    with pytest.raises(kvpref.InputError, match="log-probs need a language model; LlamaForSequenceClassification"):
        kvpref.forward_backward(reward_model, batch, oracle.weighted_loss, schedule="bounded")
    with pytest.raises(kvpref.InputError, match="log-probs need a language model"):
        kvpref.response_logps(reward_model, batch)
    step = kvpref.join_batches([batch], max_tokens_per_chunk=8)
    options = kvpref.EngineOptions(schedule="bounded", max_tokens_per_chunk=8)
    with pytest.raises(kvpref.InputError, match=r"the step's batches read .*tokens.*, and the loss .*ends"):
        kvpref.forward_backward_step(
            reward_model, step, weighted_rewards, options, references=[None], backward=lambda loss, _: loss.backward()
        )


def test_peft_trains_the_score_head_whole() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_reward_model("llama", torch.float64)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    groups = SCENARIOS["pairs"]()
    truth = naive(adapted, groups)
    found = run(kvpref.attach(adapted), groups)
    assert_same(found, truth)
    assert any("score" in name and found[1][name].abs().max() > 0 for name in found[1])
