"""Prompts with images: kvpref's trainers against TRL's, step by step, towers trained too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs the extra kvpref[trl]")
peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")

import trl_runs  # noqa: E402
import trl_vision_runs  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402
from vision_calls import padded_call  # noqa: E402
from vision_models import VisionPrompt, picture, tiny_vision_model  # noqa: E402

from kvpref import InputError  # noqa: E402
from kvpref.integrations import trl as kvpref_trl  # noqa: E402
from kvpref.integrations.trl.forwards import add_shared_prompt_head  # noqa: E402

FAMILIES = ("gemma3", "llava", "qwen2_5_vl")
NUM_STEPS = 3


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: trl_vision_runs.save_model(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def common(config: Any, path: str, output: Path, options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    arguments = {name.lower(): options.pop(name) for name in list(options) if name.isupper()}
    return {
        "model": AutoModelForImageTextToText.from_pretrained(path),
        "args": trl_runs.make_args(config, output, **{"beta": 0.5, "max_steps": NUM_STEPS, **options}),
        **arguments,
    }


def dpo(trainers: Any, name: str, path: str, output: Path, **options: Any) -> Any:
    return trainers.DPOTrainer(
        **common(trl.DPOConfig, path, output, {"max_length": None, **options}),
        train_dataset=trl_vision_runs.pairs(),
        processing_class=trl_vision_runs.make_processor(name),
    )


def kto(trainers: Any, name: str, path: str, output: Path, **options: Any) -> Any:
    return trainers.KTOTrainer(
        **common(trl.KTOConfig, path, output, {"max_length": None, "train_sampling_strategy": "sequential", **options}),
        train_dataset=trl_vision_runs.completions(),
        processing_class=trl_vision_runs.make_processor(name),
    )


def share_of_vowels(completions: list[Any], **kwargs: Any) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]


def grpo(trainers: Any, name: str, path: str, output: Path, **options: Any) -> Any:
    settings = {"num_generations": 4, "max_completion_length": 6, "per_device_train_batch_size": 8, **options}
    return trainers.GRPOTrainer(
        **common(trl.GRPOConfig, path, output, settings),
        reward_funcs=share_of_vowels,
        train_dataset=trl_vision_runs.prompts(),
        processing_class=trl_vision_runs.make_processor(name, "left"),
    )


LORA = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["v_proj", "up_proj"])
RUNS: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "DPO, qwen2_5_vl": (dpo, "qwen2_5_vl", {}),
    "DPO, gemma3": (dpo, "gemma3", {}),
    "DPO, llava": (dpo, "llava", {"gradient_checkpointing": False}),
    "DPO, LoRA": (dpo, "qwen2_5_vl", {"PEFT_CONFIG": LORA, "learning_rate": 1e-2}),
    "KTO, qwen2_5_vl": (kto, "qwen2_5_vl", {}),
    "KTO, gemma3": (kto, "gemma3", {}),
    "GRPO, qwen2_5_vl": (grpo, "qwen2_5_vl", {"num_iterations": 2}),
    "GRPO, gemma3": (grpo, "gemma3", {}),
    "GRPO, llava": (grpo, "llava", {}),
    "DPO, padded": (dpo, "llava", {"MODE": "padded"}),
}


SAMPLED = ("DPO, qwen2_5_vl", "DPO, LoRA", "KTO, gemma3", "GRPO, llava")


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "name", [name if name in SAMPLED else pytest.param(name, marks=pytest.mark.full) for name in RUNS]
)
def test_trls_numbers(name: str, paths: dict[str, str], tmp_path: Path) -> None:
    make, family, options = RUNS[name]
    plain = {key: value for key, value in options.items() if key != "MODE"}
    truth = trl_runs.run(make(trl, family, paths[family], tmp_path, **plain))
    found = trl_runs.run(make(kvpref_trl, family, paths[family], tmp_path, **options))
    trl_runs.assert_same(found, truth, num_steps=NUM_STEPS)
    assert "MODE" in options or found.num_layer_tokens < 0.8 * truth.num_layer_tokens
    assert_towers_moved_alike(found, truth)


def assert_towers_moved_alike(found: trl_runs.Run, truth: trl_runs.Run) -> None:
    """Not only the sum over all weights, of which towers have few; with LoRA its layers of the language model."""
    towers = [name for name in truth.after if "language_model" not in name and "lm_head" not in name]
    moved = sum(float((truth.after[name] - truth.before[name]).norm()) for name in towers)
    apart = sum(float((truth.after[name] - found.after[name]).norm()) for name in towers)
    assert apart <= 0.01 * moved
    assert moved or not towers


def test_rows_cut_through_an_image_are_refused_as_trl_does(paths: dict[str, str], tmp_path: Path) -> None:
    for trainers in (trl, kvpref_trl):
        with pytest.raises(ValueError, match=r"`max_length` \(20\) is too short"):
            dpo(trainers, "qwen2_5_vl", paths["qwen2_5_vl"], tmp_path, max_length=20).train()


def served(name: str) -> tuple[Any, dict[str, Any]]:
    model = tiny_vision_model(name)
    add_shared_prompt_head(model, mode="two_pass")
    return model, padded_call(name, prompts=[VisionPrompt("What is it?", (picture(1),), ("A cat.", "A dog"))])


def test_images_in_responses_are_refused() -> None:
    model, call = served("llava")
    call["labels"] = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
    call["labels"][:, 0] = -100
    with pytest.raises(InputError, match="row 0 scores an image"):
        model(**call, fused_lm_head=True)


def test_token_types_that_say_otherwise_are_refused() -> None:
    model, call = served("gemma3")
    for wrong in (torch.zeros_like(call["token_type_ids"]), torch.ones_like(call["token_type_ids"]), None):
        with pytest.raises(InputError, match="token_type_ids"):
            model(**{**call, "token_type_ids": wrong}, fused_lm_head=True)


def test_pixels_that_are_no_tensor_are_refused() -> None:
    model, call = served("llava")
    with pytest.raises(InputError, match="pixel_values must be one tensor"):
        model(**{**call, "pixel_values": list(call["pixel_values"])}, fused_lm_head=True)
    with pytest.raises(InputError, match="pixel_values_videos"):
        model(**call, pixel_values_videos=call["pixel_values"], fused_lm_head=True)
