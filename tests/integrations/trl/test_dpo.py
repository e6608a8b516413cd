"""DPO: kvpref's trainer against TRL's, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs the extra kvpref[trl]")
peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")

import trl_runs  # noqa: E402
from tiny_experts import known_families, tiny_experts  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from kvpref.integrations import trl as kvpref_trl  # noqa: E402


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return trl_runs.save_model(tmp_path_factory.mktemp("model"))


def make_trainer(trainer_class: Any, path: str, output: Path, setup: dict[str, Any] | None = None) -> Any:
    """A trainer on a fresh copy of the model; `setup` holds options of the config and, in capitals, arguments."""
    setup = dict(setup or {})
    arguments = {name.lower(): setup.pop(name) for name in list(setup) if name.isupper()}
    model = AutoModelForCausalLM.from_pretrained(path)
    if "adapted" in arguments:
        torch.manual_seed(1)
        model = peft.get_peft_model(model, arguments.pop("adapted"))
    # Another fingerprint for each, so that one trainer does not read the other's stored reference log-probs.
    data = trl_runs.pairs().add_column("made_for", [trainer_class.__module__] * 24)
    return trainer_class(
        model=model,
        args=trl_runs.make_args(trl.DPOConfig, output, **{"beta": 0.5, **setup}),
        train_dataset=data,
        eval_dataset=data.select(range(6)),
        processing_class=trl_runs.make_tokenizer(),
        **arguments,
    )


def lora(**options: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "down_proj"], **options)


SETUPS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "mixture of losses": {
        "loss_type": ["sigmoid", "bco_pair", "ipo", "aot", "sigmoid_norm", "sft"],
        "loss_weights": [0.8, 0.2, 0.3, 0.3, 0.3, 1.0],
    },
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.1},
    "f-divergence": {"f_divergence_type": "js_divergence"},
    "WPO weights": {"use_weighting": True},
    "length-desensitized": {"ld_alpha": 0.4},
    "precomputed reference": {"precompute_ref_log_probs": True, "ld_alpha": 0.4},
    "reference synchronised": {"sync_ref_model": True, "ref_model_sync_steps": 3},
    "rows cut at the end, padded to a multiple": {"max_length": 30, "pad_to_multiple_of": 16},
    "rows cut at the start": {"max_length": 24, "truncation_mode": "keep_end"},
    "padding_free, which TRL ignores": {"padding_free": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 5, "prediction_loss_only": True},
    "LoRA": {"PEFT_CONFIG": lora()},
    "LoRA, dropout switched off": {"PEFT_CONFIG": lora(lora_dropout=0.2)},
    "LoRA and a precomputed reference": {"PEFT_CONFIG": lora(), "precompute_ref_log_probs": True},
    "LoRA, head trained whole": {"PEFT_CONFIG": lora(modules_to_save=["lm_head"])},
    "an adapter to go on from": {"ADAPTED": lora(init_lora_weights=False)},
    "one pass": {"MODE": "one_pass"},
    "packed": {"MODE": "packed"},
    "padded": {"MODE": "padded"},
}
# Rows cut at their start begin at different tokens of one prompt; these modes repeat prompts.
SHARES_NOTHING = ("rows cut at the start", "packed", "padded")


@pytest.mark.thinned(6)
@pytest.mark.parametrize("name", SETUPS)
def test_every_option_gives_trls_numbers(name: str, model_path: str, tmp_path: Path) -> None:
    setup = SETUPS[name]
    plain = {key: value for key, value in setup.items() if key != "MODE"}
    truth = trl_runs.run(make_trainer(trl.DPOTrainer, model_path, tmp_path, plain))
    found = trl_runs.run(make_trainer(kvpref_trl.DPOTrainer, model_path, tmp_path, setup))
    trl_runs.assert_same(found, truth)
    if name not in SHARES_NOTHING:
        assert found.num_layer_tokens < 0.8 * truth.num_layer_tokens


def test_a_mixture_of_experts_with_its_load_balancing_loss(tmp_path: Path) -> None:
    tiny_experts("mixtral", torch.float32).save_pretrained(tmp_path / "model")
    setup = {"router_aux_loss_coef": 0.5, "gradient_checkpointing": False}
    with known_families():
        ours = trl_runs.run(make_trainer(kvpref_trl.DPOTrainer, str(tmp_path / "model"), tmp_path / "ours", setup))
    theirs = trl_runs.run(make_trainer(trl.DPOTrainer, str(tmp_path / "model"), tmp_path / "theirs", setup))
    assert any("aux_loss" in entry for entry in ours.logs)
    assert ours.num_layer_tokens < 0.8 * theirs.num_layer_tokens
    trl_runs.assert_same(ours, theirs)
