"""Vision-language models from the command line: trained on rows that name pictures, saved, scored, resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line_in_process import fail, run
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoProcessor
from vision_files import plain_logps, plain_rewards, save_model, write_groups, write_pairs

from kvpref.data import load_processor

STEPS = ("--set", "use_cpu=true", "--batch-size", 3, "--max-steps", 2, "--learning-rate", 1e-3)
CONSTANT = ("--set", "lr_scheduler_type=constant", "--set", "warmup_steps=0")
# float32; shared prompts and sequences alone add up in different orders
TOLERANCE = 1e-3
FAMILIES = ("qwen2_5_vl", "gemma3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_model(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_groups(tmp_path_factory.mktemp("groups"))


def read(path: Path, column: str) -> list[float]:
    return [json.loads(line)[column] for line in path.read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def is_of_vision(name: str) -> bool:
    return any(part in name for part in ("visual", "vision_tower", "multi_modal_projector"))


@pytest.mark.parametrize("name", FAMILIES)
def test_dpo_is_saved_with_its_processor_and_transformers_gives_the_same_numbers(
    name: str, folders: dict[str, Path], pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    run("train", folders[name], pairs, "--output", output, *STEPS)
    started = capsys.readouterr().err
    assert "parts          vision tower " in started
    assert "projector " in started
    for folder in (output, output / "checkpoint-2"):
        assert type(load_processor(str(folder))).__name__.endswith("Processor")
    if name == "gemma3":  # Qwen's asks for torchvision, for videos
        assert type(AutoProcessor.from_pretrained(output)).__name__ == "Gemma3Processor"
    run("score", output, pairs, "--output", tmp_path / "scores.jsonl")
    model, info = AutoModelForImageTextToText.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert read(tmp_path / "scores.jsonl", "sum_logp") == pytest.approx(plain_logps(model, name, pairs), abs=TOLERANCE)
    before = weights(folders[name])
    changed = {key for key, item in weights(output).items() if not torch.equal(item, before[key])}
    assert any(is_of_vision(key) for key in changed)
    assert any(not is_of_vision(key) for key in changed)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reward_model_gives_transformers_rewards(
    name: str, folders: dict[str, Path], pairs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "model"
    run("train", folders[name], pairs, "--output", output, "--loss", "bradley_terry", *STEPS)
    run("score", output, pairs, "--reward-model", "--output", tmp_path / "rewards.jsonl")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        output, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert read(tmp_path / "rewards.jsonl", "reward") == pytest.approx(plain_rewards(model, name, pairs), abs=TOLERANCE)
    assert model.config.get_text_config().pad_token_id is not None  # transformers pads rows with it


@pytest.mark.parametrize(
    "schedule", [(), ("--schedule", "bounded", "--max-tokens-per-chunk", 16)], ids=["full", "bounded"]
)
def test_frozen_towers_stay_as_they_are(
    schedule: tuple[object, ...], folders: dict[str, Path], groups: Path, tmp_path: Path
) -> None:
    output = tmp_path / "model"
    run("train", folders["gemma3"], groups, "--output", output, "--loss", "grpo", "--freeze-vision", *STEPS, *schedule)
    before, after = weights(folders["gemma3"]), weights(output)
    assert {key for key in after if is_of_vision(key)}
    assert all(torch.equal(after[key], before[key]) for key in after if is_of_vision(key))
    assert any(not torch.equal(after[key], before[key]) for key in after)


def test_lora_stays_off_the_tower_unless_it_is_named(folders: dict[str, Path], pairs: Path, tmp_path: Path) -> None:
    folder = folders["gemma3"]
    run("train", folder, pairs, "--output", tmp_path / "text", "--lora-r", 2, *STEPS)
    named = ("--lora-target-modules", "q_proj")
    run("train", folder, pairs, "--output", tmp_path / "named", "--lora-r", 2, *named, *STEPS)
    adapted = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("text", "named")}
    assert len(adapted["text"]) == 2 * 7 * 3  # two factors on seven linear layers of three layers
    assert not [key for key in adapted["text"] if is_of_vision(key)]
    assert [key for key in adapted["named"] if is_of_vision(key)]
    run("score", tmp_path / "text", pairs, "--output", tmp_path / "scores.jsonl")
    assert len(read(tmp_path / "scores.jsonl", "sum_logp")) == 12


def test_a_resumed_run_is_the_run_that_went_on(folders: dict[str, Path], pairs: Path, tmp_path: Path) -> None:
    steps = ("--set", "use_cpu=true", "--batch-size", 2, "--learning-rate", 1e-3, *CONSTANT)
    run("train", folders["qwen2_5_vl"], pairs, "--output", tmp_path / "whole", "--max-steps", 3, *steps)
    run("train", folders["qwen2_5_vl"], pairs, "--output", tmp_path / "two", "--max-steps", 2, *steps)
    run("train", "--output", tmp_path / "two", "--resume", "--max-steps", 3)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "two")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_random_weights_of_a_configuration(folders: dict[str, Path], pairs: Path, tmp_path: Path) -> None:
    config = tmp_path / "tiny.json"
    config.write_text((folders["qwen2_5_vl"] / "config.json").read_text())
    source = ("--model-config", config, "--tokenizer", folders["qwen2_5_vl"])
    run("train", pairs, *source, "--output", tmp_path / "model", "--max-image-pixels", 64, *STEPS)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert model.config.model_type == "qwen2_5_vl"


@pytest.mark.parametrize("name", FAMILIES)
def test_check_knows_the_family(name: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run("check", folders[name])
    assert f"supported ({name}, " in capsys.readouterr().out.replace("\n", " ")


def test_vision_cannot_be_frozen_where_there_is_none(
    config_file: Path, tokenizer_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ("--model-config", config_file, "--tokenizer", tokenizer_dir)
    line = fail(capsys, "train", pairs_file, *source, "--output", tmp_path / "x", "--freeze-vision", *STEPS)
    assert "LlamaForCausalLM has no vision tower" in line


def test_a_text_model_refuses_rows_with_images(
    config_file: Path, tokenizer_dir: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ("--model-config", config_file, "--tokenizer", tokenizer_dir)
    line = fail(capsys, "train", pairs, *source, "--output", tmp_path / "x", *STEPS)
    assert f"{pairs}:1" in line
    assert "images" in line


@pytest.mark.full
@pytest.mark.parametrize("loss", ["dpo", "bradley_terry", "grpo"])
@pytest.mark.parametrize("way", ["full", "lora", "bounded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_loss_trains_every_way(
    name: str, way: str, loss: str, folders: dict[str, Path], pairs: Path, groups: Path, tmp_path: Path
) -> None:
    options = {"full": (), "lora": ("--lora-r", 2), "bounded": ("--schedule", "bounded", "--max-tokens-per-chunk", 16)}
    data = groups if loss == "grpo" else pairs
    output = tmp_path / "model"
    run("train", folders[name], data, "--output", output, "--loss", loss, *options[way], *STEPS)
    rewards = ("--reward-model",) if loss == "bradley_terry" else ()
    run("score", output, data, *rewards, "--output", tmp_path / "scores.jsonl")
    column = "reward" if rewards else "sum_logp"
    assert all(value == value for value in read(tmp_path / "scores.jsonl", column))
    assert (output / "processor_config.json").is_file()
