"""What the trainers do to models: theirs alone are changed, and checkpoints stay plain."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs the extra kvpref[trl]")

import trl_runs  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402
from trl.trainer import dpo_trainer, utils  # noqa: E402

import kvpref  # noqa: E402
from kvpref.integrations import trl as kvpref_trl  # noqa: E402


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return trl_runs.save_model(tmp_path_factory.mktemp("model"))


def dpo(trainer_class: Any, model: Any, output: Path, ref_model: Any = None, **options: Any) -> Any:
    return trainer_class(
        model=model,
        ref_model=ref_model,
        args=trl_runs.make_args(trl.DPOConfig, output, **{"beta": 0.5, **options}),
        train_dataset=trl_runs.pairs(),
        processing_class=trl_runs.make_tokenizer(),
    )


def sharing_config(model: Any) -> Any:
    """Another model, of other weights, whose config is the same object."""
    torch.manual_seed(2)
    other = type(model)(model.config)
    assert other.config is model.config
    return other


def test_a_model_that_shares_the_config_is_left_as_it_was(model_path: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path)
    bystander = sharing_config(model)
    before = bystander.config._attn_implementation
    trainer = dpo(kvpref_trl.DPOTrainer, model, tmp_path)
    assert trainer.model.config._attn_implementation != before
    assert bystander.config._attn_implementation == before
    assert "forward" not in vars(bystander)


def test_a_reference_that_shares_the_config(model_path: str, tmp_path: Path) -> None:
    runs = []
    for trainer_class in (trl.DPOTrainer, kvpref_trl.DPOTrainer):
        model = AutoModelForCausalLM.from_pretrained(model_path)
        runs.append(trl_runs.run(dpo(trainer_class, model, tmp_path, ref_model=sharing_config(model))))
    truth, found = runs
    trl_runs.assert_same(found, truth)


@pytest.mark.full
def test_models_that_were_attached_before(model_path: str, tmp_path: Path) -> None:
    """TRL loads the reference with the policy's attention; one model goes through two trainers."""
    truth = trl_runs.run(dpo(trl.DPOTrainer, AutoModelForCausalLM.from_pretrained(model_path), tmp_path))
    model = kvpref.attach(AutoModelForCausalLM.from_pretrained(model_path))
    dpo(kvpref_trl.DPOTrainer, model, tmp_path)
    trl_runs.assert_same(trl_runs.run(dpo(kvpref_trl.DPOTrainer, model, tmp_path)), truth)


@pytest.mark.full
def test_models_loaded_by_trl(model_path: str, tmp_path: Path) -> None:
    found = trl_runs.run(dpo(kvpref_trl.DPOTrainer, model_path, tmp_path))
    trl_runs.assert_same(found, trl_runs.run(dpo(trl.DPOTrainer, model_path, tmp_path)))


def test_trl_itself_is_left_as_it_was(model_path: str, tmp_path: Path) -> None:
    dpo(kvpref_trl.DPOTrainer, model_path, tmp_path)
    assert dpo_trainer.add_fused_lm_head is utils.add_fused_lm_head
    with pytest.raises(ValueError, match="train_dataset"):
        kvpref_trl.DPOTrainer(model=model_path, args=trl_runs.make_args(trl.DPOConfig, tmp_path))
    assert dpo_trainer.add_fused_lm_head is utils.add_fused_lm_head


@pytest.mark.usefixtures("own_precision")
def test_bf16_as_trl_sets_it(model_path: str, tmp_path: Path) -> None:
    """TRL's default: accelerate runs the forward under autocast and gives it another name."""
    found = trl_runs.run(dpo(kvpref_trl.DPOTrainer, model_path, tmp_path, bf16=True))
    exact = trl_runs.run(dpo(trl.DPOTrainer, model_path, tmp_path, bf16=True))
    # bf16 has 8 bits; log-probs of 40 nats are in these losses.
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(exact.losses), rtol=2e-2, atol=2e-2)
    assert not torch.is_autocast_enabled("cpu"), "an autocast that was entered twice stays on"


def test_checkpoints_load_and_resume_as_trls_do(model_path: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 5}
    whole = dpo(kvpref_trl.DPOTrainer, model_path, tmp_path / "whole", **options)
    trl_runs.run(whole)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-10")
    assert "kvpref" not in (tmp_path / "whole" / "checkpoint-10" / "config.json").read_text()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name

    resumed = dpo(kvpref_trl.DPOTrainer, model_path, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_trained_reward_model_gives_its_rewards_by_itself(model_path: str, tmp_path: Path) -> None:
    trainer = kvpref_trl.RewardTrainer(
        model=model_path,
        args=trl_runs.make_args(trl.RewardConfig, tmp_path),
        train_dataset=trl_runs.pairs(),
        processing_class=trl_runs.make_tokenizer(),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    inputs = next(iter(trainer.get_train_dataloader()))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    trainer.model.eval()
    with torch.no_grad():
        expected = loaded(**inputs).logits
        assert torch.unique(expected).numel() == expected.numel()
        torch.testing.assert_close(trainer.model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        _, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-5, atol=1e-5)


def test_generation_is_the_models_own(model_path: str, tmp_path: Path) -> None:
    trainer = dpo(kvpref_trl.DPOTrainer, model_path, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(model_path)
    prompts = trl_runs.make_tokenizer()(
        ["w5 w6 w7 w8", "w9 w10"], padding=True, padding_side="left", return_tensors="pt"
    )
    prompts.pop("token_type_ids", None)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = plain.eval().generate(**prompts, **options)
    assert torch.equal(trainer.model.eval().generate(**prompts, **options), expected)


def test_without_trl_the_import_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['trl'] = None\n"
        "import kvpref.integrations\n"
        "try:\n"
        "    import kvpref.integrations.trl\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200, check=True)
    assert 'pip install "kvpref[trl]"' in done.stdout
