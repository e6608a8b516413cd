"""Training arguments that cannot work are refused where they are made, and what libraries refuse is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from preference_runs import make_args, make_groups, make_model

import kvpref
from kvpref import InputError

BEST = {"load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be at least 0; got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0; got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"adam_epsilon": -1e-8}, "adam_epsilon must be at least 0"),
        ({"adam_beta1": 1.5}, "adam_beta1 must be at least 0 and below 1; got 1.5"),
        ({"adam_beta2": 1.0}, "adam_beta2 must be at least 0 and below 1; got 1.0"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha cannot be used: a shared prompt is embedded once"),
        ({"use_liger_kernel": True}, "use_liger_kernel cannot be used: it replaces layers"),
        ({"parallelism_config": "abc"}, "parallelism_config must be an accelerate.ParallelismConfig"),
        ({"fsdp": "full_shard"}, "fsdp needs several processes"),
        ({**BEST}, r"there are none: give evaluation data \(--eval-data, eval_dataset\) and how often"),
        (
            {**BEST, "eval_strategy": "epoch", "save_strategy": "steps"},
            "eval_strategy is epoch while save_strategy is steps; make them the same",
        ),
        (
            {**BEST, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 4},
            r"save_steps \(4\) must be a multiple of eval_steps \(3\)",
        ),
    ],
)
def test_arguments_that_cannot_work(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as found:
        kvpref.PreferenceTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert "\n" not in str(found.value)


def test_their_ends_are_taken(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learning_rate": 0.0, "adam_beta1": 0.0, "adam_beta2": 0.0, "weight_decay": 0.0, **BEST}
    evaluations: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}
    kvpref.PreferenceTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings, **evaluations)
    kvpref.PreferenceTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, **{**BEST, "eval_strategy": "epoch", "save_strategy": "best"}
    )


def make_trainer(path: Path, **settings: Any) -> kvpref.PreferenceTrainer:
    return kvpref.PreferenceTrainer(make_model(), make_args(str(path), **settings), make_groups(2))


def refuse(*args: Any, **kwargs: Any) -> None:
    raise ValueError("no\nsuch thing")


def test_what_constructors_refuse_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", refuse)
        with pytest.raises(InputError, match=r"^the trainer cannot be made with these settings: no such thing$"):
            make_trainer(tmp_path)
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(torch.optim.SGD, "__init__", refuse)
    with pytest.raises(InputError, match=r"^the optimizer cannot be made with these settings: no such thing$"):
        trainer.train()


def test_mistakes_elsewhere_are_not_taken_for_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpref.training.trainer.prepare_data", refuse)
    with pytest.raises(ValueError, match="such thing") as found:
        make_trainer(tmp_path)
    assert not isinstance(found.value, InputError)


def test_a_hub_that_is_not_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class UnreachableError(Exception):
        """As HTTP libraries have it: of no common base."""

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise UnreachableError("Name or service not known")

    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", unreachable)
    with pytest.raises(InputError, match="push_to_hub: the hub's repository cannot be made: Name or service not known"):
        make_trainer(tmp_path, push_to_hub=True)
