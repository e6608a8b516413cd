"""GRPO: TRL generates, kvpref computes the update; against TRL's own trainer, step by step."""

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


def prompts() -> Dataset:
    words = trl_runs.Words()
    return Dataset.from_list([{"prompt": words.prompt().strip()} for _ in range(12)])


def share_of_even_words(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that a text decides alone."""
    numbers = [[int(word[1:]) for word in text.split() if word.startswith("w")] for text in completions]
    return [sum(number % 2 == 0 for number in row) / max(1, len(row)) for row in numbers]


def make_trainer(trainer_class: Any, path: str, output: Path, setup: dict[str, Any]) -> Any:
    setup = {"num_generations": 4, "max_completion_length": 8, **setup}
    arguments = {name.lower(): setup.pop(name) for name in list(setup) if name.isupper()}
    return trainer_class(
        model=AutoModelForCausalLM.from_pretrained(path),
        reward_funcs=share_of_even_words,
        args=trl_runs.make_args(trl.GRPOConfig, output, **{"per_device_train_batch_size": 8, **setup}),
        train_dataset=prompts(),
        eval_dataset=prompts().select(range(4)),
        processing_class=trl_runs.make_tokenizer(),
        **arguments,
    )


SETUPS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "KL to a reference": {"beta": 0.1},
    "old log-probs": {"num_iterations": 2, "beta": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "steps_per_generation": 4},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sequences": {"importance_sampling_level": "sequence", "num_iterations": 2},
    "temperature": {"temperature": 0.7, "top_k": 40},
    "truncated completions masked": {"mask_truncated_completions": True, "max_completion_length": 20},
    "entropy bonus": {"entropy_coef": 0.05},
    "uncertain tokens only": {"top_entropy_quantile": 0.5},
    "reference synchronised": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 3},
    "padded to a multiple": {"pad_to_multiple_of": 16},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 4},
    "static cache": {"cache_implementation": "static"},
    "LoRA": {
        "PEFT_CONFIG": peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["v_proj", "up_proj"]),
        "beta": 0.1,
    },
}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", SETUPS)
def test_every_option_gives_trls_numbers(name: str, model_path: str, tmp_path: Path) -> None:
    truth = trl_runs.run(make_trainer(trl.GRPOTrainer, model_path, tmp_path, SETUPS[name]))
    found = trl_runs.run(make_trainer(kvpref_trl.GRPOTrainer, model_path, tmp_path, SETUPS[name]))
    trl_runs.assert_same(found, truth)
    assert found.num_layer_tokens < 0.7 * truth.num_layer_tokens
