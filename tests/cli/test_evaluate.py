"""`kvpref eval`: its figures are those of each sequence alone, and of the trainer; a reference is never made up."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import Run
from command_line_in_process import fail, run
from oracle import naive_token_logps, true_float64
from preference_runs import make_model
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer

import kvpref
from kvpref.cli.evaluation_report import wilson_interval
from kvpref.data import load_preferences

STEPS = ["--max-steps", 2, "--batch-size", 4, "--learning-rate", 1e-2, "--set", "use_cpu=true"]
BETA = 0.3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> tuple[Path, Path]:
    """Folders of two float64 models: one to evaluate, and its reference."""
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path_factory.mktemp("models") / str(seed))
        make_model(seed).save_pretrained(folders[-1])
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folders[-1])
    return folders[0], folders[1]


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    run("eval", *arguments, "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def sums_alone(seed: int, groups: list[kvpref.Group]) -> torch.Tensor:
    """(num_groups, 2): log-probs of the responses, each sequence alone."""
    model = make_model(seed).eval()
    with true_float64(), torch.no_grad():
        return torch.stack([torch.stack([naive_token_logps(model, [one]).sum() for one in alone(g)]) for g in groups])


def alone(group: kvpref.Group) -> list[kvpref.Group]:
    return [kvpref.Group([sequence]) for sequence in group.sequences]


def test_dpo_is_what_each_sequence_alone_gives(
    models: tuple[Path, Path], pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "eval.json"
    found = evaluated(
        capsys,
        *(models[0], pairs_file, "--loss", "dpo", "--loss-arg", f"beta={BETA}", "--reference", models[1]),
        *("--dtype", "auto", "--max-tokens", 150, "--output", output),
    )
    assert json.loads(output.read_text()) == found
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    groups = list(load_preferences(str(pairs_file), tokenizer))
    policy, reference = sums_alone(0, groups), sums_alone(1, groups)
    rewards = BETA * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    accuracy = (margins > 0).double().mean().item()
    expected = {
        "eval_loss": -logsigmoid(margins).mean().item(),
        "eval_rewards/chosen": rewards[:, 0].mean().item(),
        "eval_rewards/rejected": rewards[:, 1].mean().item(),
        "eval_rewards/margins": margins.mean().item(),
        "eval_rewards/accuracies": accuracy,
        "eval_logps/chosen": policy[:, 0].mean().item(),
        "eval_logps/rejected": policy[:, 1].mean().item(),
    }
    # float64, sums of a few hundred terms of order one
    assert found["metrics"] == pytest.approx(expected, abs=1e-9)
    assert 0 < accuracy < 1
    low, high = found["intervals"]["eval_rewards/accuracies"]
    assert low < accuracy < high
    assert (found["num_groups"], found["num_responses"], found["reference"]) == (24, 48, str(models[1]))

    trainer = kvpref.PreferenceTrainer(
        make_model(0),
        kvpref.PreferenceTrainingArguments(
            str(tmp_path / "trainer"), loss_args={"beta": BETA}, use_cpu=True, precompute_reference=False
        ),
        eval_dataset=str(pairs_file),
        reference_model=make_model(1),
        processing_class=tokenizer,
    )
    own = {name: value for name, value in trainer.evaluate().items() if name.startswith("eval_")}
    assert found["metrics"] == pytest.approx(own, abs=1e-9)


def test_sft_gives_the_perplexity_of_all_tokens(
    models: tuple[Path, Path], pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, models[0], pairs_file, "--loss", "sft", "--dtype", "auto")
    groups = list(load_preferences(str(pairs_file), AutoTokenizer.from_pretrained(models[0])))
    model = make_model(0).eval()
    with true_float64(), torch.no_grad():
        logps = torch.cat([naive_token_logps(model, [alone(group)[0]]) for group in groups])
    assert found["metrics"]["eval_loss"] == pytest.approx(-logps.mean().item(), abs=1e-9)
    assert found["metrics"]["eval_perplexity"] == pytest.approx(math.exp(-logps.mean().item()), rel=1e-9)
    assert (found["reference"], found["intervals"]) == (None, {})


@pytest.fixture(scope="module")
def dpo_run(tmp_path_factory: pytest.TempPathFactory, trained_dir: Path, pairs_file: Path) -> Path:
    output = tmp_path_factory.mktemp("dpo") / "run"
    run("train", trained_dir, pairs_file, "--output", output, "--loss-arg", "beta=0.5", *STEPS, "--save-steps", 2)
    return output


def test_a_runs_folder_knows_its_loss_and_its_reference(
    dpo_run: Path, trained_dir: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--loss", "dpo", "--loss-arg", "beta=0.5", "--reference", trained_dir)
    expected = evaluated(capsys, dpo_run, pairs_file, *given)
    assert abs(expected["metrics"]["eval_loss"] - math.log(2)) > 1e-3
    for folder in (dpo_run, dpo_run / "checkpoint-2"):
        found = evaluated(capsys, folder, pairs_file, "--tokenizer", dpo_run)
        assert found["metrics"] == pytest.approx(expected["metrics"])
        assert (found["loss"], found["loss_args"]) == ("dpo", {"beta": 0.5})
        assert str(trained_dir) in found["reference"]


def test_sequences_are_cut_as_the_run_cut_them(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(trained_dir, cut)
    settings = yaml.safe_load((cut / "run.yaml").read_text())
    (cut / "run.yaml").write_text(yaml.safe_dump(settings | {"max_prompt_tokens": 3, "max_response_tokens": 1}))
    found = evaluated(capsys, cut, pairs_file)["metrics"]
    limits = ("--max-prompt-tokens", 3, "--max-response-tokens", 1)
    assert found == evaluated(capsys, trained_dir, pairs_file, *limits)["metrics"]
    run("eval", cut, pairs_file, "--max-prompt-tokens", 4)
    assert f"max_response_tokens 1, as {cut / 'run.yaml'} says" in capsys.readouterr().err


def test_an_adapter_is_compared_with_its_base(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="needs the extra kvpref[peft]")
    output = tmp_path / "adapter"
    run("train", trained_dir, pairs_file, "--output", output, "--lora-r", 4, *STEPS)
    expected = evaluated(capsys, output, pairs_file, "--reference", trained_dir)
    assert abs(expected["metrics"]["eval_loss"] - math.log(2)) > 1e-4
    for has_run in (True, False):
        found = evaluated(capsys, output, pairs_file)
        assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)
        assert found["reference"] == "the base model, with the adapter off"
        if has_run:
            (output / "run.yaml").unlink()


def test_a_reference_is_not_made_up(
    dpo_run: Path,
    trained_dir: Path,
    models: tuple[Path, Path],
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    remedy = "give --reference, the folder or hub name of the model that its training started from"
    error = fail(capsys, "eval", models[0], pairs_file, "--loss", "dpo")
    assert "loss 'dpo' compares" in error
    assert remedy in error
    error = fail(capsys, "eval", models[0], pairs_file, "--loss", "dpo", "--reference", f"{models[0]}/")
    assert "is the model that is evaluated" in error
    assert remedy in error
    # made from random weights, which are gone
    error = fail(capsys, "eval", trained_dir, pairs_file, "--loss", "dpo")
    assert "started from random weights, which are gone" in error
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "config.json").touch()
    text = (dpo_run / "run.yaml").read_text()
    (moved / "run.yaml").write_text(text.replace(str(trained_dir), str(tmp_path / "gone")))
    error = fail(capsys, "eval", moved, pairs_file)
    assert f"started from {tmp_path / 'gone'}, which is no longer there; {remedy}" in error
    error = fail(capsys, "eval", models[0], pairs_file, "--loss", "simpo", "--reference", models[1])
    assert "loss 'simpo' reads no reference; leave it out" in error


def test_reward_models_are_judged_by_the_pairs_that_they_order_right(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, scores = tmp_path / "reward", tmp_path / "scores.jsonl"
    run("train", trained_dir, pairs_file, "--output", output, "--loss", "bradley_terry", *STEPS)
    found = evaluated(capsys, output, pairs_file)
    run("score", output, pairs_file, "--reward-model", "--output", scores)
    rewards = [json.loads(line)["reward"] for line in scores.read_text().splitlines()]
    right = sum(chosen > rejected for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True))
    assert found["loss"] == "bradley_terry"
    assert found["metrics"]["eval_accuracy"] == pytest.approx(right / 24)
    assert found["intervals"]["eval_accuracy"] == pytest.approx(wilson_interval(right / 24, 24))
    error = fail(capsys, "eval", trained_dir, pairs_file, "--loss", "bradley_terry")
    assert "it is no reward model" in error


@pytest.mark.full
def test_two_processes_give_the_figures_of_one(
    models: tuple[Path, Path],
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kvpref_command: Run,
) -> None:
    arguments = (models[0], pairs_file, "--loss", "dpo", "--reference", models[1], "--dtype", "auto")
    expected = evaluated(capsys, *arguments)
    output = tmp_path / "two.json"
    done = kvpref_command("eval", *arguments, "--max-tokens", 150, "--num-processes", 2, "--output", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rewards/margins") == 1  # one of them speaks
    found = json.loads(output.read_text())
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-9)
    assert found["num_responses"] == expected["num_responses"] == 48


@pytest.mark.parametrize(
    ("share", "num_groups", "expected"),
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3
    [
        (81 / 263, 263, (0.2553, 0.3662)),
        (15 / 148, 148, (0.0624, 0.1605)),
        (0.0, 20, (0.0, 0.1611)),
        (1 / 29, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_intervals_are_newcombes(share: float, num_groups: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(share, num_groups) == pytest.approx(expected, abs=1e-4)
