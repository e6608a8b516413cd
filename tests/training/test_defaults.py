"""The trainer's defaults for settings that were not given."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from preference_runs import make_args, make_groups, make_model
from tiny_models import tiny_reward_model

import kvpref
from kvpref import forward_backward
from kvpref.data.batching import budgets
from kvpref.losses import LOSSES
from kvpref.models.precision import device_has_bf16
from kvpref.training import step_runner
from kvpref.training.defaults import token_budget

SETTINGS: dict[str, dict[str, Any]] = {"mixture": {"weights": {"sft": 1.0, "dpo": 1.0}, "settings": {}}}
FULL_AND_ADAPTER = {
    "dpo": (5e-7, 5e-6),
    "plackett_luce": (5e-7, 5e-6),
    "kto": (5e-7, 5e-6),
    "simpo": (5e-7, 5e-6),
    "cpo": (1e-6, 5e-6),
    "orpo": (5e-6, 5e-5),
    "sft": (2e-5, 2e-4),
    "weighted_sft": (2e-5, 2e-4),
    "grpo": (1e-6, 1e-5),
    "bradley_terry": (1e-5, 1e-4),
    "mixture": (5e-7, 5e-6),
}


def default_args(output: Path, loss: str = "dpo", **given: Any) -> kvpref.PreferenceTrainingArguments:
    return kvpref.PreferenceTrainingArguments(
        output_dir=str(output),
        loss=loss,
        loss_args=SETTINGS.get(loss),
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        **given,
    )


def make_trainer(
    args: kvpref.PreferenceTrainingArguments, *, adapter: bool = False, **given: Any
) -> kvpref.PreferenceTrainer:
    model: Any = tiny_reward_model("gpt2") if args.make_loss().reads == "ends" else make_model()
    if adapter:
        task = "SEQ_CLS" if args.make_loss().reads == "ends" else "CAUSAL_LM"
        model = get_peft_model(model, LoraConfig(task_type=task, r=2, target_modules=["c_attn"]))
    return kvpref.PreferenceTrainer(model, args, make_groups(5), **given)


@pytest.mark.parametrize("loss", FULL_AND_ADAPTER)
def test_the_learning_rate_follows_from_loss_and_adapter(loss: str, tmp_path: Path) -> None:
    args = default_args(tmp_path, loss)
    found = tuple(make_trainer(args, adapter=adapter).args.learning_rate for adapter in (False, True))
    assert found == FULL_AND_ADAPTER[loss]
    assert args.learning_rate is None  # the arguments may make a trainer for another loss


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_has_rates_with_a_source(loss: str) -> None:
    rates = kvpref.losses.make_loss(loss, **SETTINGS.get(loss, {})).learning_rates
    assert 3e-7 <= rates.full < rates.adapter <= 2e-4
    assert len(rates.source) > 15


def test_a_loss_of_a_user_is_taken_for_dpo_unless_it_reads_rewards(tmp_path: Path) -> None:
    def mine(policy: Any, reference: Any, batch: Any) -> Any:
        return -policy.sum().mean()

    def rewarding(policy: Any, reference: Any, batch: Any) -> Any:
        return -policy.rewards.mean()

    rewarding.reads = "ends"  # type: ignore[attr-defined]
    assert make_trainer(default_args(tmp_path), loss=mine).args.learning_rate == 5e-7
    assert kvpref.losses.as_loss(rewarding).learning_rates.full == 1e-5


def test_a_learning_rate_that_is_given_stays(tmp_path: Path) -> None:
    assert make_trainer(default_args(tmp_path, learning_rate=5e-5)).args.learning_rate == 5e-5
    assert make_trainer(default_args(tmp_path, learning_rate=0.0)).args.learning_rate == 0.0


def test_one_epoch_with_warmup_and_cosine_decay(tmp_path: Path) -> None:
    args = default_args(tmp_path, learning_rate=1.0, per_device_train_batch_size=1, logging_steps=1)
    trainer = kvpref.PreferenceTrainer(make_model(), args, make_groups(20))
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert len(rates) == 20
    assert rates[:3] == [0.0, 0.5, 1.0]  # a tenth of the steps
    assert all(before > after for before, after in pairwise(rates[2:]))
    assert rates[11] == pytest.approx(0.5)  # halfway down the cosine


@pytest.mark.parametrize(("num_steps", "num_warmup"), [(0, 0), (1, 0), (2, 1), (10, 1), (11, 2), (1000, 100)])
def test_a_run_of_one_step_is_not_all_warmup(num_steps: int, num_warmup: int, tmp_path: Path) -> None:
    assert default_args(tmp_path).get_warmup_steps(num_steps) == num_warmup
    assert default_args(tmp_path, warmup_steps=7).get_warmup_steps(num_steps) == 7


def test_what_was_chosen_survives_copies_and_json(tmp_path: Path) -> None:
    args = make_trainer(default_args(tmp_path)).args
    assert json.loads(args.to_json_string())["learning_rate"] == 5e-7
    assert dataclasses.replace(args, seed=3).learning_rate == 5e-7
    assert dataclasses.replace(default_args(tmp_path), seed=3).learning_rate is None


# The token budget


def test_the_budget_is_at_least_the_largest_group(tmp_path: Path) -> None:
    groups = make_groups(5)
    args = default_args(tmp_path)
    assert token_budget(args, kvpref.data.PreferenceDataset(groups)) == 8192
    responses = ([1] * 400, [2] * 600)
    largest = kvpref.Group([kvpref.Sequence.from_prompt_and_response([3] * 8000, answer) for answer in responses])
    long = kvpref.data.PreferenceDataset([*groups, largest])
    for mode, tokens in {"two_pass": 9000, "one_pass": 9000, "packed": 17000, "padded": 17200}.items():
        assert token_budget(default_args(tmp_path, mode=mode), long) == tokens
    assert token_budget(default_args(tmp_path, max_tokens_per_micro_batch=100), long) == 100
    assert token_budget(default_args(tmp_path, max_tokens_per_micro_batch=None), long) is None


def test_a_default_budget_refuses_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "DEFAULT_MAX_TOKENS", 20)
    trainer = make_trainer(make_args(str(tmp_path), loss="sft", max_tokens_per_micro_batch="auto"))
    trainer.train()
    assert trainer.token_meter.num_groups == 2 * 5
    longer = make_groups(5, seed=1)
    assert trainer.evaluate(longer)  # another data set than the one it was made for
    with pytest.raises(kvpref.InputError, match="raise max_tokens_per_micro_batch"):
        make_trainer(make_args(str(tmp_path), max_tokens_per_micro_batch=20, mode="packed")).train()


@pytest.mark.parametrize("options", [{"schedule": "bounded", "max_tokens_per_chunk": 8}, {"schedule": "full"}])
def test_a_group_that_exceeds_the_budget_runs_in_chunks(tmp_path: Path, options: dict[str, Any]) -> None:
    """Its responses stay together, so that the loss is that of a budget without a bound."""
    weights = []
    for budget in (20, None):
        args = make_args(str(tmp_path), max_tokens_per_micro_batch=budget, **options)
        trainer = make_trainer(args)
        trainer.train()
        weights.append(torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]))
    # Two steps of plain SGD in fp64, in which only the order of sums differs.
    torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-12)


def test_only_what_exceeds_the_budget_runs_in_chunks_in_schedule_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def watched(model: Any, batch: kvpref.Batch, loss: Any, options: Any, **others: Any) -> Any:
        ran.append((batch.num_unique_tokens, options.schedule, options.max_tokens_per_chunk))
        return forward_backward(model, batch, loss, options, **others)

    monkeypatch.setattr(step_runner, "forward_backward", watched)
    make_trainer(make_args(str(tmp_path), max_tokens_per_micro_batch=34)).train()
    assert {schedule for _, schedule, _ in ran} == {"full", "bounded"}
    for num_tokens, schedule, chunk in ran:
        assert (schedule, chunk) == (("bounded", 34) if num_tokens > 34 else ("full", None))


@pytest.mark.parametrize("loss", ["kto", "aot", "aot_unpaired"])
def test_losses_that_couple_groups_are_not_cut_by_default(loss: str, tmp_path: Path) -> None:
    assert make_trainer(default_args(tmp_path, loss)).args.max_tokens_per_micro_batch is None
    given = default_args(tmp_path, loss, max_tokens_per_micro_batch=500)
    assert make_trainer(given).args.max_tokens_per_micro_batch == 500


def test_a_mixture_couples_groups_if_a_part_does(tmp_path: Path) -> None:
    make = kvpref.losses.make_loss
    assert make("mixture", weights={"dpo": 1, "aot": 1}).couples_groups
    assert not make("mixture", weights={"dpo": 1, "sft": 1}).couples_groups


@pytest.mark.parametrize("budget", [0, -5, True, "none", "8192", 1.5])
def test_what_is_no_budget_is_refused(budget: Any, tmp_path: Path) -> None:
    with pytest.raises(kvpref.InputError, match="max_tokens_per_micro_batch must be"):
        default_args(tmp_path, max_tokens_per_micro_batch=budget)


# Precision


def test_autocast_where_the_gpu_computes_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_args(tmp_path).bf16 is False  # on the CPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for has_it in (True, False):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True, has=has_it: has)
        assert device_has_bf16() is has_it
    assert default_args(tmp_path).bf16 is False  # use_cpu was given


def test_bf16_on_the_cpu_works(tmp_path: Path) -> None:
    args = make_args(str(tmp_path), bf16=True, optim="adamw_torch", learning_rate=1e-3)
    trainer = kvpref.PreferenceTrainer(make_model().float(), args, make_groups(5))
    dtypes = set()
    trainer.model.transformer.h[0].mlp.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    start = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert dtypes >= {torch.bfloat16}
    assert any((now != before).any() for now, before in zip(trainer.model.parameters(), start, strict=True))
