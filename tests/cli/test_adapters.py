"""LoRA from the command line: saved in peft's format, continued, and refused with reasons."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from command_line_in_process import fail, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")

STEPS = ["--max-steps", 2, "--batch-size", 4, "--learning-rate", 1e-2, "--set", "use_cpu=true"]


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory, trained_dir: Path, pairs_file: Path) -> Path:
    output = tmp_path_factory.mktemp("lora") / "adapter"
    lora = ["--lora-r", 4, "--lora-alpha", 12, "--lora-target-modules", "q_proj, v_proj"]
    run("train", trained_dir, pairs_file, "--output", output, *lora, *STEPS)
    return output


def test_the_adapter_is_saved_in_pefts_format(adapter_dir: Path, trained_dir: Path) -> None:
    names = {path.name for path in adapter_dir.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "run.yaml"} <= names
    assert "model.safetensors" not in names
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], set(config["target_modules"])) == (4, 12, {"q_proj", "v_proj"})
    assert config["base_model_name_or_path"] == str(trained_dir)

    plain = AutoModelForCausalLM.from_pretrained(trained_dir)
    tuned = peft.AutoPeftModelForCausalLM.from_pretrained(adapter_dir)
    tokens = torch.tensor([[2, 3, 4]])
    assert not torch.equal(tuned(input_ids=tokens).logits, plain(input_ids=tokens).logits)


def test_an_adapter_is_trained_further_and_scored(adapter_dir: Path, pairs_file: Path, tmp_path: Path) -> None:
    run("train", adapter_dir, pairs_file, "--output", tmp_path / "more", *STEPS)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter_dir, tmp_path / "more"))
    assert before.keys() == after.keys()
    assert all("lora_" in name for name in after)
    assert not any(torch.equal(before[name], after[name]) for name in after)
    run("score", adapter_dir, pairs_file, "--output", tmp_path / "before.jsonl")
    run("score", tmp_path / "more", pairs_file, "--output", tmp_path / "after.jsonl")
    sums = [
        [json.loads(line)["sum_logp"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("before", "after")
    ]
    assert sums[0] != sums[1]


def test_check_takes_an_adapters_folder(
    adapter_dir: Path, trained_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("check", adapter_dir, "--json")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == {
        "model": str(adapter_dir),
        "supported": True,
        "model_type": "llama",
        "base_model": str(trained_dir),
    }
    run("check", adapter_dir, "--numeric", "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["max_logp_error"] < 1e-4
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    for name, targets in (("head", ["lm_head"]), ("other", ["query"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    run("check", tmp_path / "head")
    assert "the adapter does not fit its base model" in fail(capsys, "check", tmp_path / "other")


def test_check_takes_the_adapter_of_a_reward_model(
    trained_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    settings.base_model_name_or_path = str(trained_dir)
    settings.save_pretrained(tmp_path)
    run("check", tmp_path)
    assert "this is the adapter of a reward model" in fail(capsys, "check", tmp_path, "--numeric")


def test_a_finished_adapter_is_not_overwritten(
    adapter_dir: Path, trained_dir: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fail(capsys, "train", trained_dir, pairs_file, "--output", adapter_dir, *STEPS)
    assert "holds an earlier run" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--lora-r", 4, "--lora-target-modules", "q_proj,query"],
            r"no module 'query'; its linear layers: down_proj, ",
        ),
        (["--lora-r", 0], "--lora-r: expected a number of at least 1; got 0"),
        (["--lora-alpha", 8], "give its rank, lora_r, too"),
    ],
)
def test_bad_settings(
    trained_dir: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[object],
    message: str,
) -> None:
    assert message in fail(capsys, "train", trained_dir, pairs_file, "--output", tmp_path / "out", *options)


def test_what_could_not_be_loaded_again_is_refused(
    adapter_dir: Path,
    config_file: Path,
    tokenizer_dir: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    random = ["--model-config", config_file, pairs_file, "--tokenizer", tokenizer_dir]
    error = fail(capsys, "train", *random, "--output", tmp_path / "out", "--lora-r", 4)
    assert "an adapter is saved without its base model" in error
    error = fail(capsys, "train", adapter_dir, pairs_file, "--output", tmp_path / "out", "--lora-r", 4)
    assert "holds an adapter, which is trained further; leave --lora-r out" in error
    lost = tmp_path / "lost"
    lost.mkdir()
    for path in adapter_dir.glob("*.*"):
        (lost / path.name).write_bytes(path.read_bytes())
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    error = fail(capsys, "train", lost, pairs_file, "--output", tmp_path / "out")
    assert f"{lost}: cannot load the adapter: " in error


def test_without_peft_the_extra_is_named(
    trained_dir: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    error = fail(capsys, "train", trained_dir, pairs_file, "--output", tmp_path / "out", "--lora-r", 4)
    assert 'pip install "kvpref[peft]"' in error


def test_plan_names_the_adapters_base_model(
    adapter_dir: Path, trained_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"kvpref plan {trained_dir} --lora-r 4 --lora-target-modules q_proj,v_proj ..."
    assert fail(capsys, "plan", adapter_dir) == (
        f"error: {adapter_dir}: holds an adapter; name its base model in its place: {command}"
    )
