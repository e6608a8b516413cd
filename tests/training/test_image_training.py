"""Training on prompts with images in the library: rows and processor, frozen towers, and references that see images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference_runs import reference_logps
from tiny_models import tiny_model
from torch import nn
from vision_families import build_vision_processor
from vision_files import plain_logps, save_model, write_pairs
from vision_models import tiny_vision_model

import kvpref
from kvpref.errors import InputError
from kvpref.models.lora_targets import find_targets
from kvpref.models.vision.parts import vision_parts

FAMILY = "gemma3"
# float32; shared prompts and sequences alone add up in different orders
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def expected(pairs: Path) -> list[float]:
    """Log-probs of the model as it is before training."""
    return plain_logps(tiny_vision_model(FAMILY).eval(), FAMILY, pairs)


def make_trainer(
    output: Path, pairs: Path, model: nn.Module | None = None, second: nn.Module | None = None, **settings: Any
) -> kvpref.PreferenceTrainer:
    args = kvpref.PreferenceTrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=3,
        max_steps=2,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return kvpref.PreferenceTrainer(
        tiny_vision_model(FAMILY) if model is None else model,
        args,
        str(pairs),
        reference_model=second,
        processing_class=build_vision_processor(FAMILY),
    )


def sums(trainer: kvpref.PreferenceTrainer, logps: torch.Tensor) -> list[float]:
    sizes = [sum(sequence.scored) for group in trainer.train_dataset for sequence in group.sequences]
    return [item.sum().item() for item in logps.split(sizes)]


def _lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=find_targets(model, "all-linear")))


WAYS: dict[str, dict[str, Any]] = {
    "stored": {},
    "a copy": {"precompute_reference": False},
    "bounded": {"precompute_reference": False, "schedule": "bounded", "max_tokens_per_chunk": 16},
    "adapter off": {"precompute_reference": False, "reference": "base"},
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("way", WAYS)
def test_the_reference_sees_the_images(way: str, pairs: Path, expected: list[float], tmp_path: Path) -> None:
    model = tiny_vision_model(FAMILY)
    trainer = make_trainer(tmp_path, pairs, _lora(model) if way == "adapter off" else model, **WAYS[way])
    trainer.train()
    assert sums(trainer, reference_logps(trainer)) == pytest.approx(expected, abs=TOLERANCE)


def test_a_second_model_sees_the_images(pairs: Path, expected: list[float], tmp_path: Path) -> None:
    folder = save_model(FAMILY, tmp_path / "second")
    given = make_trainer(tmp_path / "a", pairs, second=tiny_vision_model(FAMILY))
    named = make_trainer(tmp_path / "b", pairs, reference_model=str(folder))
    for trainer in (given, named):
        assert sums(trainer, reference_logps(trainer)) == pytest.approx(expected, abs=TOLERANCE)


def test_a_reference_that_sees_no_images_is_refused(pairs: Path, tmp_path: Path) -> None:
    vocab_size = tiny_vision_model(FAMILY).config.get_text_config().vocab_size
    trainer = make_trainer(tmp_path, pairs, second=tiny_model("llama", vocab_size=vocab_size))
    with pytest.raises(InputError, match=r"pairs\.jsonl:1: .*LlamaForCausalLM, the reference, reads none"):
        trainer.train()


@pytest.mark.parametrize("schedule", ["full", "bounded"])
def test_a_frozen_tower_gets_no_gradient(schedule: str, pairs: Path, tmp_path: Path) -> None:
    model = tiny_vision_model(FAMILY)
    before = copy.deepcopy(model.state_dict())
    make_trainer(tmp_path, pairs, model, schedule=schedule, freeze_vision=True).train()
    frozen = vision_parts(model).weights
    assert frozen
    assert all(item.grad is None and torch.equal(item, before[name]) for name, item in frozen.items())
    assert not torch.equal(model.model.language_model.norm.weight, before["model.language_model.norm.weight"])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "llava"])
def test_parts_of_a_model_are_told_apart(name: str) -> None:
    model = tiny_vision_model(name)
    found = vision_parts(model)
    assert found.tower
    assert found.projector
    assert all(any(part in key for part in ("merger", "projector")) for key in found.projector)
    rest = dict(model.named_parameters()).keys() - found.weights.keys()
    assert all(key.startswith(("model.language_model.", "lm_head.")) for key in rest)


def test_a_text_model_has_no_parts() -> None:
    assert not vision_parts(tiny_model("llama")).weights
    assert find_targets(tiny_model("llama"), "all-linear") == "all-linear"
