"""The trainer: the same training in every mode and split, references, resuming, clear failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import make_args, make_groups, make_model
from transformers import AutoModelForCausalLM, TrainerCallback

import kvpref
from kvpref.data import PreferenceDataset

# float64 model: only the order of sums differs between two ways to one gradient.
TOLERANCE = 1e-10


def train(output: Path, groups: list[kvpref.Group] | None = None, **overrides: Any) -> kvpref.PreferenceTrainer:
    args = make_args(str(output), **overrides)
    trainer = kvpref.PreferenceTrainer(make_model(), args, train_dataset=groups or make_groups())
    trainer.train()
    return trainer


def weights(trainer: kvpref.PreferenceTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def relative_update_error(trainer: kvpref.PreferenceTrainer, expected: kvpref.PreferenceTrainer) -> float:
    start = torch.cat([parameter.detach().flatten() for parameter in make_model().parameters()])
    update = weights(expected) - start
    assert update.norm() > 1e-2, "training must have moved the weights"
    return ((weights(trainer) - weights(expected)).norm() / update.norm()).item()


@pytest.mark.parametrize("loss", ["dpo", "sft"])
@pytest.mark.parametrize("mode", ["one_pass", "packed", "padded"])
def test_every_mode_trains_alike(tmp_path: Path, loss: str, mode: str) -> None:
    expected = train(tmp_path / "two_pass", loss=loss)
    assert relative_update_error(train(tmp_path / mode, loss=loss, mode=mode), expected) < TOLERANCE


@pytest.mark.parametrize("loss", ["dpo", "sft"])
def test_gradient_does_not_depend_on_micro_batches(tmp_path: Path, loss: str) -> None:
    expected = train(tmp_path / "whole", loss=loss, max_tokens_per_micro_batch=None)
    split = train(tmp_path / "split", loss=loss, max_tokens_per_micro_batch=60)
    assert relative_update_error(split, expected) < TOLERANCE


def test_gradient_accumulation_averages_over_all_groups(tmp_path: Path) -> None:
    # One step over 11 groups: whole, or accumulated from steps of 4, 4 and 3 groups.
    settings: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 1}
    expected = train(tmp_path / "whole", per_device_train_batch_size=11, **settings)
    parts = train(tmp_path / "parts", per_device_train_batch_size=4, gradient_accumulation_steps=3, **settings)
    assert parts.state.global_step == expected.state.global_step == 1
    assert relative_update_error(parts, expected) < TOLERANCE
    assert parts.state.log_history[0]["loss"] == pytest.approx(expected.state.log_history[0]["loss"], rel=1e-6)


def test_gradient_checkpointing_trains_alike(tmp_path: Path) -> None:
    expected = train(tmp_path / "plain")
    assert relative_update_error(train(tmp_path / "ckpt", gradient_checkpointing=True), expected) < TOLERANCE


def test_first_dpo_loss_is_log_two_and_then_falls(tmp_path: Path) -> None:
    trainer = train(tmp_path, max_steps=20, learning_rate=5.0)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    # Policy and reference are the same model at first: margins are 0 and -log sigmoid(0) = log 2.
    assert losses[0] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert losses[-1] < 0.5


def test_logs_rewards_and_throughput(tmp_path: Path) -> None:
    train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first = lines[0]
    assert {"step", "loss", "rewards/margins", "rewards/accuracies", "groups_per_second", "token_saving"} <= set(first)
    assert first["token_saving"] > 1.2


def test_evaluate_is_the_mean_over_all_groups(tmp_path: Path) -> None:
    groups = make_groups(7, seed=3)
    args = make_args(str(tmp_path), per_device_eval_batch_size=2, loss="sft")
    trainer = kvpref.PreferenceTrainer(make_model(), args, train_dataset=make_groups(), eval_dataset=groups)
    found = trainer.evaluate()["eval_loss"]
    batch = kvpref.collate([args.make_loss().select(group) for group in groups])
    with torch.no_grad():
        token_logps = kvpref.response_logps(trainer.model, batch, mode="padded").token_logps
    assert found == pytest.approx(-token_logps.mean().item(), rel=1e-10)


def test_reference_is_stored_and_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "references" / "train.safetensors"
    first = train(tmp_path / "a", reference_logps_dir=str(path.parent))
    written = path.read_bytes()
    monkeypatch.setattr("kvpref.training.references.stored._compute", lambda *args: pytest.fail("computed again"))
    second = train(tmp_path / "b", reference_logps_dir=str(path.parent))
    assert path.read_bytes() == written
    assert torch.equal(weights(first), weights(second))


@pytest.mark.parametrize("changed", ["model", "data"])
def test_reference_of_another_model_or_data_is_refused(tmp_path: Path, changed: str) -> None:
    train(tmp_path)
    model = make_model(seed=1) if changed == "model" else make_model()
    groups = make_groups(seed=1) if changed == "data" else make_groups()
    trainer = kvpref.PreferenceTrainer(model, make_args(str(tmp_path)), train_dataset=groups)
    with pytest.raises(kvpref.InputError, match=rf"train\.safetensors: .*another {changed}.*; delete the file"):
        trainer.train()


def test_unreadable_reference_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference_logps" / "train.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"not safetensors")
    with pytest.raises(kvpref.InputError, match="cannot read reference log-probs"):
        train(tmp_path)


def test_resume_repeats_the_uninterrupted_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 7, "optim": "adamw_torch", "learning_rate": 1e-2, "save_steps": 3}
    whole = train(tmp_path / "whole", **settings)
    stopped = make_args(str(tmp_path / "parts"), save_strategy="steps", **settings)
    kvpref.PreferenceTrainer(make_model(), stopped, train_dataset=make_groups(), callbacks=[_StopAfter(step=4)]).train()
    resumed = kvpref.PreferenceTrainer(make_model(), stopped, train_dataset=make_groups())
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    # Bitwise: the same steps in the same order on the same machine.
    assert torch.equal(weights(resumed), weights(whole))
    steps = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in steps if "loss" in line] == [
        (line["step"], line["loss"]) for line in expected if "loss" in line
    ]


def test_saved_model_loads_without_kvpref(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    trainer.save_model(str(tmp_path / "final"))
    assert "kvpref" not in (tmp_path / "final" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float64)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_nan_loss_stops_and_names_the_groups(tmp_path: Path) -> None:
    def broken(policy: kvpref.ResponseLogps, reference: None, batch: kvpref.Batch) -> kvpref.LossOutput:
        return kvpref.LossOutput(policy.sum().mean() * float("nan"), {})

    trainer = kvpref.PreferenceTrainer(make_model(), make_args(str(tmp_path)), train_dataset=make_groups(), loss=broken)
    before = weights(trainer).clone()
    with pytest.raises(kvpref.RunError, match=r"loss is nan at optimizer step 1.*made:\d+"):
        trainer.train()
    assert torch.equal(weights(trainer), before)


def test_group_over_the_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(kvpref.InputError, match=r"made:\d+: .*max_tokens_per_micro_batch"):
        train(tmp_path, mode="packed", max_tokens_per_micro_batch=20)  # which has no chunks


def test_group_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    long = kvpref.Sequence.from_prompt_and_response([1] * 126, [2, 3, 4])
    short = kvpref.Sequence.from_prompt_and_response([1] * 126, [2])
    groups = [kvpref.Group([long, short], labels=[True, False], id="data.jsonl:9")]
    with pytest.raises(kvpref.InputError, match=r"data\.jsonl:9: .*129 tokens.*128.*max_prompt_tokens"):
        train(tmp_path, groups, max_tokens_per_micro_batch=None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"loss": "nope"}, "unknown loss 'nope'; choose from: dpo, "),
        ({"loss_args": {"betta": 1.0}}, "has no setting 'betta'; it has: beta, "),
        ({"loss_args": {"beta": -1.0}}, "beta must be positive"),
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"schedule": "lazy"}, "unknown schedule 'lazy'"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(kvpref.InputError, match=message):
        make_args(str(tmp_path), **overrides)


def test_dataset_is_left_as_it_was_given(tmp_path: Path) -> None:
    dataset = PreferenceDataset(make_groups())
    train_groups = list(dataset)
    args = make_args(str(tmp_path), loss="sft")
    trainer = kvpref.PreferenceTrainer(make_model(), args, train_dataset=dataset)
    assert all(len(group) == 1 for group in trainer.train_dataset or [])
    assert list(dataset) == train_groups


class _StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


@pytest.mark.parametrize(
    ("mode", "at_least", "at_most"), [("two_pass", 1.2, 2.0), ("packed", 1, 1), ("padded", 0.5, 1)]
)
def test_token_saving_counts_the_tokens_that_ran(tmp_path: Path, mode: str, at_least: float, at_most: float) -> None:
    trainer = train(tmp_path, mode=mode)
    assert at_least <= trainer.token_meter.token_saving <= at_most
    assert trainer.token_meter.num_groups == 11


def test_torch_compile_means_the_layers(tmp_path: Path) -> None:
    args = kvpref.PreferenceTrainingArguments(output_dir=str(tmp_path), torch_compile=True)
    assert args.compile_layers
    assert not args.torch_compile
    with pytest.raises(kvpref.InputError, match=r"kvpref\.compile_layers"):
        kvpref.PreferenceTrainingArguments(output_dir=str(tmp_path), torch_compile_backend="eager")
