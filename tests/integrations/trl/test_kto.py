"""KTO, with its KL batch: kvpref's trainer against TRL's, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

trl = pytest.importorskip("trl", reason="needs the extra kvpref[trl]")
peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")

import trl_runs  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from kvpref.integrations import trl as kvpref_trl  # noqa: E402


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return trl_runs.save_model(tmp_path_factory.mktemp("model"))


def labelled(made_for: str) -> Dataset:
    """Three completions of each prompt, good ones and bad ones, in a row."""
    words = trl_runs.Words()
    prompts = [words.prompt() for _ in range(8)]
    rows = [
        {"prompt": prompt, "completion": words.text(2, 12), "label": words.flag(), "made_for": made_for}
        for prompt in prompts
        for _ in range(3)
    ]
    return Dataset.from_list(rows)


def make_trainer(trainer_class: Any, path: str, output: Path, setup: dict[str, Any]) -> Any:
    setup = {"beta": 0.5, "train_sampling_strategy": "sequential", **setup}
    arguments = {name.lower(): setup.pop(name) for name in list(setup) if name.isupper()}
    return trainer_class(
        model=AutoModelForCausalLM.from_pretrained(path),
        args=trl_runs.make_args(trl.KTOConfig, output, **{"per_device_train_batch_size": 6, **setup}),
        train_dataset=labelled(trainer_class.__module__),
        eval_dataset=labelled(trainer_class.__module__).select(range(6)),
        processing_class=trl_runs.make_tokenizer(),
        **arguments,
    )


SETUPS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no KL batch": {"loss_type": "apo_zero_unpaired"},
    "precomputed reference": {"precompute_ref_log_probs": True},
    "weights": {"desirable_weight": 1.5, "undesirable_weight": 0.5},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 3},
    "LoRA": {"PEFT_CONFIG": peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["v_proj", "up_proj"])},
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", SETUPS)
def test_every_option_gives_trls_numbers(name: str, model_path: str, tmp_path: Path) -> None:
    truth = trl_runs.run(make_trainer(trl.KTOTrainer, model_path, tmp_path, SETUPS[name]))
    found = trl_runs.run(make_trainer(kvpref_trl.KTOTrainer, model_path, tmp_path, SETUPS[name]))
    trl_runs.assert_same(found, truth)
    assert found.num_layer_tokens < 0.7 * truth.num_layer_tokens
