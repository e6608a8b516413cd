"""Training adapters: the reference without a second model, PEFT's own files, resuming, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import make_args, make_groups, make_model
from reference_runs import reference_logps, relative_error, token_logps
from torch import nn

import kvpref
from kvpref.training.references.models import model_fingerprint

peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")

LOG_TWO = 0.6931471805599453  # logged losses are float32
# float64 model: only the order of sums differs.
TOLERANCE = 1e-10


def wrap(base: nn.Module, *, seed: int = 1, **options: Any) -> Any:
    """LoRA in float64, new (it does nothing) unless `init_lora_weights` is False (random)."""
    config = {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **config)).double()


def trained_adapter(**options: Any) -> Any:
    """As from an earlier run: its weights are random, so that it changes the model."""
    return wrap(make_model(), init_lora_weights=False, **options)


def make_trainer(output: Path, model: nn.Module, **overrides: Any) -> kvpref.PreferenceTrainer:
    return kvpref.PreferenceTrainer(model, make_args(str(output), **overrides), train_dataset=make_groups())


def first_loss(trainer: kvpref.PreferenceTrainer) -> float:
    return trainer.state.log_history[0]["loss"]


ENGINES: list[dict[str, Any]] = [
    {"mode": "two_pass"},
    {"mode": "one_pass"},
    {"mode": "packed"},
    {"mode": "padded"},
    {"schedule": "bounded", "max_tokens_per_chunk": 16},
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "online"])
@pytest.mark.parametrize("engine", ENGINES, ids=["two_pass", "one_pass", "packed", "padded", "bounded"])
def test_adapter_off_is_the_base_model(tmp_path: Path, engine: dict[str, Any], precompute: bool) -> None:
    trainer = make_trainer(
        tmp_path, trained_adapter(), reference="base", precompute_reference=precompute, learning_rate=0.05, **engine
    )
    expected = token_logps(make_model())
    assert relative_error(reference_logps(trainer), expected) < TOLERANCE
    trainer.train()
    assert first_loss(trainer) != pytest.approx(LOG_TWO, abs=1e-4), "the random adapter differs from the base model"
    assert relative_error(reference_logps(trainer), expected) < TOLERANCE, "training must not change the reference"
    assert relative_error(token_logps(trainer.model), expected) > 1e-4


@pytest.mark.thinned(3)
@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "online"])
@pytest.mark.parametrize("engine", ENGINES, ids=["two_pass", "one_pass", "packed", "padded", "bounded"])
def test_an_adapter_that_is_trained_on_starts_as_its_own_reference(
    tmp_path: Path, engine: dict[str, Any], precompute: bool
) -> None:
    trainer = make_trainer(
        tmp_path, trained_adapter(), precompute_reference=precompute, max_steps=3, learning_rate=0.05, **engine
    )
    expected = token_logps(trained_adapter())
    assert relative_error(reference_logps(trainer), expected) < TOLERANCE
    trainer.train()
    assert first_loss(trainer) == pytest.approx(LOG_TWO, abs=1e-7)
    assert relative_error(reference_logps(trainer), expected) < TOLERANCE
    assert relative_error(token_logps(trainer.model), expected) > 1e-4


def test_a_new_adapter_starts_at_the_base_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, wrap(make_model(), modules_to_save=["ln_f"]), precompute_reference=False)
    trainer.train()
    assert first_loss(trainer) == pytest.approx(LOG_TWO, abs=1e-7)
    assert relative_error(reference_logps(trainer), token_logps(make_model())) < TOLERANCE


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_relatives_of_lora(tmp_path: Path, options: dict[str, Any]) -> None:
    """PiSSA changes the base weights, so that only the adapter as it starts is the model that was given."""
    base = make_model().float()  # PEFT decomposes no float64 weights
    trainer = make_trainer(tmp_path, wrap(base, **options), precompute_reference=False)
    trainer.train()
    assert first_loss(trainer) == pytest.approx(LOG_TWO, abs=1e-6)
    assert relative_error(reference_logps(trainer), token_logps(make_model())) < 1e-5  # float32 weights
    assert relative_error(token_logps(trainer.model), token_logps(make_model())) > 1e-4


def test_weights_trained_beside_the_adapter_are_put_back_for_the_reference(tmp_path: Path) -> None:
    """Biases are the base model's own: switching the adapter off leaves them as they were trained."""
    model = wrap(make_model(), bias="all")
    trainer = make_trainer(tmp_path, model, precompute_reference=False)
    trainer.train()
    assert relative_error(reference_logps(trainer), token_logps(make_model())) < TOLERANCE
    with pytest.raises(kvpref.InputError, match="outside the adapter"):
        make_trainer(tmp_path, model, precompute_reference=False, reference="base")


def test_the_reference_leaves_no_trace_on_the_policy(tmp_path: Path) -> None:
    model = trained_adapter()
    frozen = next(item for name, item in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    before = {name: (item.requires_grad, item.data_ptr()) for name, item in model.named_parameters()}
    for number, settings in enumerate(({"reference": "base"}, {"precompute_reference": False})):
        reference_logps(make_trainer(tmp_path / str(number), model, **settings))
        assert {name: (item.requires_grad, item.data_ptr()) for name, item in model.named_parameters()} == before
    assert model.training


def test_bfloat16_base_under_float32_adapters(tmp_path: Path) -> None:
    """What a quantised base looks like to the engine: adapters wider than the frozen weights under them."""
    base = make_model().bfloat16()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    settings = {"max_steps": 8, "optim": "adamw_torch", "learning_rate": 5e-2}
    dtypes = {item.dtype for item in model.parameters() if item.requires_grad}
    assert dtypes == {torch.float32}
    trainer = make_trainer(tmp_path, model, precompute_reference=False, **settings)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(LOG_TWO, abs=1e-6)
    assert losses[-1] < 0.68
    assert {item.dtype for item in model.parameters() if item.requires_grad} == {torch.float32}
    # The very same bfloat16 operations, with the adapter off and without one.
    base = kvpref.attach(make_model().bfloat16().eval())
    inputs = next(iter(trainer._make_loader(trainer.train_dataset, 100, shuffle=False))).micro_batches
    with torch.no_grad():
        for item in inputs:
            expected = kvpref.response_logps(base, item.batch).token_logps
            assert torch.equal(trainer.references.for_batch("train", item, item.batch).token_logps, expected)


@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "online"])
@pytest.mark.usefixtures("own_precision")
def test_mixed_precision_holds_for_the_reference_too(tmp_path: Path, precompute: bool) -> None:
    """A reference in full precision would differ from the policy before the first step."""
    model = wrap(make_model()).float()
    trainer = make_trainer(tmp_path, model, bf16=True, precompute_reference=precompute, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    in_full = token_logps(make_model().float())
    assert relative_error(reference_logps(trainer), in_full) > 1e-5, "bfloat16 must have been used"


def test_saved_adapters_are_pefts_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trained_adapter(modules_to_save=["lm_head"]), learning_rate=0.05)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path / "saved")
    # PEFT loads into float32 adapters.
    assert relative_error(token_logps(loaded), token_logps(trainer.model)) < 1e-6


@pytest.mark.thinned(2)
@pytest.mark.parametrize("settings", [{}, {"precompute_reference": False}], ids=["precomputed", "online"])
@pytest.mark.parametrize("is_new", [True, False], ids=["new", "trained on"])
def test_resume_repeats_the_uninterrupted_run(tmp_path: Path, is_new: bool, settings: dict[str, Any]) -> None:
    def start(seed: int) -> Any:
        return wrap(make_model(), seed=seed) if is_new else trained_adapter()

    settings = {"max_steps": 6, "optim": "adamw_torch", "learning_rate": 1e-2, "save_steps": 3, **settings}
    whole = make_trainer(tmp_path / "whole", start(1), save_strategy="steps", **settings)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    # A new adapter is random in one factor; the run that goes on need not draw the same.
    resumed = make_trainer(tmp_path / "whole", start(2), save_strategy="steps", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    assert torch.equal(token_logps(resumed.model), token_logps(whole.model))
    assert relative_error(token_logps(whole.model), token_logps(start(1))) > 1e-4


def test_resuming_with_the_checkpoints_own_adapter_is_refused(tmp_path: Path) -> None:
    """It would become its own reference, in silence."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "precompute_reference": False}
    make_trainer(tmp_path, trained_adapter(), learning_rate=0.05, **settings).train()
    checkpoint = tmp_path / "checkpoint-1"
    wrong = peft.PeftModel.from_pretrained(make_model(), checkpoint, is_trainable=True).double()
    with pytest.raises(kvpref.InputError, match="another reference"):
        make_trainer(tmp_path, wrong, **settings).train(resume_from_checkpoint=str(checkpoint))


def test_several_active_adapters_are_refused(tmp_path: Path) -> None:
    model = trained_adapter()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    make_trainer(tmp_path, model)  # loaded, not active
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(kvpref.InputError, match="default, second"):
        make_trainer(tmp_path, model)


def test_adapter_dropout_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, wrap(make_model(), lora_dropout=0.1))
    with pytest.raises(kvpref.UnsupportedModelError, match="lora_dropout"):
        trainer.train()


def test_base_needs_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(kvpref.InputError, match="adapter switched off"):
        make_trainer(tmp_path, make_model(), reference="base")


def test_fingerprint_of_the_base_does_not_depend_on_the_adapter() -> None:
    def fingerprint(base_seed: int, adapter_seed: int, **options: Any) -> str:
        return model_fingerprint(wrap(make_model(base_seed), seed=adapter_seed), **options)

    assert fingerprint(0, 1) == fingerprint(0, 2)
    assert fingerprint(0, 1) != fingerprint(3, 1)
    assert fingerprint(0, 1, with_adapter=True) != fingerprint(0, 2, with_adapter=True)
