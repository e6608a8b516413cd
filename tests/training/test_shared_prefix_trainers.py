"""Other people's trainers inside `shared_prefix`: the same losses, step by step, from fewer tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from padded_batches import one_prompt, padded, switch_on
from tiny_models import tiny_model
from transformers import Trainer, TrainingArguments

# Both runs round to fp32 (6e-8) in different places, and each step starts from what the one before left.
TOLERANCE = 1e-5


def trainer_losses(output: Path, switched: bool) -> tuple[list[float], int]:
    """The losses of three steps with `transformers.Trainer`, and how many calls were served."""
    rows = padded(one_prompt(8))
    data = Dataset.from_dict({name: tensor.tolist() for name, tensor in rows.items()})
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = tiny_model("llama")
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    switch = switch_on(model)
    if not switched:
        switch.close()
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], switch.stats.num_served


def test_transformers_trainer(tmp_path: Path) -> None:
    truth, none_served = trainer_losses(tmp_path / "plain", switched=False)
    found, num_served = trainer_losses(tmp_path / "shared", switched=True)
    assert (none_served, num_served) == (0, 3)
    assert found == pytest.approx(truth, rel=TOLERANCE)


SETUPS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "re-entrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


def trl_run(output: Path, when: str | None, setup: dict[str, Any], adapter: bool) -> tuple[Any, Any]:
    """Ten steps of TRL's own DPO; the switch is set before or after the trainer patches the model, or not at all."""
    trl = pytest.importorskip("trl", reason="needs the extra kvpref[trl]")
    peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")
    import trl_runs

    model, reference = tiny_model("llama"), tiny_model("llama")
    # Where policy and reference agree, rounding alone would decide which response is preferred.
    reference.lm_head.weight.data.mul_(1.1)
    switch = switch_on(model) if when == "before" else None
    torch.manual_seed(1)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], init_lora_weights=False)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=None if adapter else reference,
        args=trl_runs.make_args(trl.DPOConfig, output, beta=0.5, **setup),
        # Another fingerprint for each run.
        train_dataset=trl_runs.pairs().add_column("made_for", [str(output)] * 24),
        processing_class=trl_runs.make_tokenizer(),
        peft_config=lora if adapter else None,
    )
    if when == "after":
        switch = switch_on(trainer.model)
    return trl_runs.run(trainer), switch


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("setup", "when", "adapter"),
    [
        ("defaults", "before", False),
        ("defaults", "after", False),
        ("defaults", "before", True),
        ("no checkpointing", "after", True),
        ("re-entrant", "after", False),
    ],
)
def test_trl_dpo(setup: str, when: str, adapter: bool, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra kvpref[trl]")
    import trl_runs

    truth, _ = trl_run(tmp_path / "plain", None, SETUPS[setup], adapter)
    found, switch = trl_run(tmp_path / "shared", when, SETUPS[setup], adapter)
    trl_runs.assert_same(found, truth, tolerance=TOLERANCE)
    if setup == "re-entrant":
        assert switch.stats.unserved["gradient checkpointing"] >= trl_runs.NUM_STEPS
        assert found.num_layer_tokens == truth.num_layer_tokens
    else:
        assert switch.stats.num_served >= trl_runs.NUM_STEPS, switch.stats
        assert found.num_layer_tokens < truth.num_layer_tokens
