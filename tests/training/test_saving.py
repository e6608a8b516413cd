"""Saves that fail or are killed leave what was there; what can fail is tried before the first step."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import make_args, make_groups, make_model
from safetensors.torch import load_file
from transformers import GenerationConfig, TrainerCallback, TrainerState

import kvpref
from kvpref.training import preflight
from kvpref.training.generation_config import repaired
from kvpref.training.saving import is_complete

SAVES = {"save_strategy": "steps", "save_steps": 1}


def make_trainer(output: Path, model: Any = None, **overrides: Any) -> kvpref.PreferenceTrainer:
    args = make_args(str(output), precompute_reference=False, **overrides)
    return kvpref.PreferenceTrainer(model or make_model(), args, train_dataset=make_groups())


def no_first_step(trainer: kvpref.PreferenceTrainer) -> None:
    def step(*args: Any) -> None:
        pytest.fail("a step was made")

    trainer.training_step = step  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature", "top_p"}),
        ({"temperature": 0.6}, {"temperature"}),
        ({"num_beams": 1, "early_stopping": True}, {"early_stopping"}),
        ({"do_sample": True, "temperature": 0.6}, set()),
    ],
    ids=["greedy", "not said", "no beams", "fine"],
)
def test_generation_settings_are_repaired_in_what_is_saved(
    tmp_path: Path, settings: dict[str, Any], left_out: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    trainer = make_trainer(tmp_path, model, **SAVES, save_total_limit=1)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        saved = GenerationConfig.from_pretrained(folder)
        assert all(getattr(saved, name) == value for name, value in settings.items() if name not in left_out)
        assert all(getattr(saved, name) is None for name in left_out)
        assert (folder / "model.safetensors").exists()
    assert all(getattr(model.generation_config, name) == value for name, value in settings.items())
    lines = [line for line in capsys.readouterr().err.splitlines() if "generation settings" in line]
    assert len(lines) == bool(left_out)
    assert all(name in lines[0] for name in left_out)


def test_what_cannot_be_saved_at_all_keeps_its_tokens() -> None:
    config = GenerationConfig(eos_token_id=[1, 2], pad_token_id=3)
    config.max_new_tokens = -1
    saved, names = repaired(config)
    assert (saved.eos_token_id, saved.pad_token_id, saved.max_new_tokens) == ([1, 2], 3, None)
    assert "max_new_tokens" in names


def test_a_folder_that_cannot_be_written_to_stops_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    trainer = make_trainer(tmp_path / "out")
    trainer.args.output_dir = str(tmp_path / "file" / "out")
    no_first_step(trainer)
    with pytest.raises(kvpref.InputError, match="cannot be written to: Not a directory"):
        trainer.train()


def test_a_tokenizer_that_cannot_be_saved_stops_before_the_first_step(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: Any) -> None:
            raise ValueError("no way\nto save this")

    trainer = make_trainer(tmp_path)
    trainer.processing_class = Broken()
    no_first_step(trainer)
    with pytest.raises(kvpref.RunError, match="at step 0: no way to save this"):
        trainer.train()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
@pytest.mark.parametrize(("optim", "states"), [("adamw_torch", 2), ("sgd", 0)])
def test_a_disk_too_full_for_a_checkpoint_stops_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str, states: int, spare: int, fits: bool
) -> None:
    """A checkpoint is weights and optimizer state, and the final model comes beside it."""
    trainer = make_trainer(tmp_path, optim=optim, **SAVES)
    weights = sum(item.numel() * item.element_size() for item in trainer.model.parameters())
    usage = namedtuple("usage", ["free"])(weights * (2 + states) + spare)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if fits:
        assert list(preflight.check_saving(trainer)) == []
        return
    no_first_step(trainer)
    with pytest.raises(kvpref.RunError, match="a checkpoint and the final model take"):
        trainer.train()


class _KilledError(BaseException):
    """As if the process had ended: nothing handles it."""


@pytest.mark.thinned(2)
@pytest.mark.parametrize("last", ["model", "optimizer", "scheduler", "rng", "state"])
def test_a_save_that_is_cut_off_is_not_taken_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """Also where the folder held a complete checkpoint of that step before, and with only one kept."""
    names = {
        "model": "save_model",
        "optimizer": "_save_optimizer_and_scheduler",
        "scheduler": "_save_scaler",
        "rng": "_save_rng_state",
        "state": "_save_rng_state",
    }
    make_trainer(tmp_path, **SAVES, save_total_limit=1, max_steps=1).train()
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-2")
    trainer = make_trainer(tmp_path, **SAVES, save_total_limit=1, max_steps=2)
    original = getattr(trainer, names[last])

    def cut(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == 2:
            if last == "state":
                original(*args, **kwargs)
            raise _KilledError
        original(*args, **kwargs)

    monkeypatch.setattr(trainer, names[last], cut)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)  # a killed process cleans nothing up
    with pytest.raises(_KilledError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert is_complete(tmp_path / "checkpoint-1")
    assert not is_complete(tmp_path / "checkpoint-2")


def test_an_incomplete_checkpoint_does_not_push_out_a_complete_one(tmp_path: Path) -> None:
    """transformers deletes the oldest by number where times are close, and would keep the incomplete one."""
    (tmp_path / "checkpoint-7").mkdir()
    make_trainer(tmp_path, **SAVES, save_total_limit=1).train()
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-2"]


def test_a_final_model_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model-00001-of-00002.safetensors").touch()  # of an earlier, larger model
    with torch.no_grad():
        trainer.model.transformer.wte.weight.mul_(2)
    trainer.processing_class = type("Broken", (), {"save_pretrained": _disk_full})()
    with pytest.raises(kvpref.RunError, match="No space left"):
        trainer.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    trainer.processing_class = None
    trainer.save_model()
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")["transformer.wte.weight"], trainer.model.transformer.wte.weight
    )
    assert sorted(path.name for path in tmp_path.glob("*model*")) == ["model.safetensors"]


def _disk_full(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_run_that_was_killed_after_its_last_step_makes_no_other(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **SAVES, max_steps=1)  # an epoch has two steps
    trainer.train()
    again = make_trainer(tmp_path, **SAVES, max_steps=1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 1
    for name, item in trainer.model.named_parameters():
        assert torch.equal(item, again.model.get_parameter(name))


def test_with_no_checkpoint_none_is_called_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, **SAVES, max_steps=3)
    monkeypatch.setattr(TrainerState, "save_to_json", _disk_full)
    with pytest.raises(kvpref.RunError, match=r"at step 1: .*; there is no earlier checkpoint\. .*then start again$"):
        trainer.train()


def test_after_a_loss_that_is_not_finite_the_run_resumes(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                kwargs["model"].transformer.ln_f.register_forward_hook(lambda *args: args[-1] * float("nan"))

    whole = make_trainer(tmp_path / "whole", max_steps=3)
    whole.train()
    trainer = make_trainer(tmp_path, **SAVES, max_steps=3)
    trainer.add_callback(Poison())
    with pytest.raises(kvpref.RunError, match=r"step 3: .*earlier checkpoints are intact.*--resume"):
        trainer.train()
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-1", "checkpoint-2"]
    again = make_trainer(tmp_path, **SAVES, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, item in whole.model.named_parameters():
        assert torch.equal(item, again.model.get_parameter(name))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
