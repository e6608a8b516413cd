"""Training from agents' trajectories: whole conversations whose template rewrites history, and rows of model calls."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_templates import THINKS, build_agent_tokenizer, calls_of, conversation
from command_line_in_process import run
from transformers import LlamaConfig, LlamaForCausalLM

ANSWERS = {"warm": 1.0, "cold": 0.0, "mild": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_agent_tokenizer(THINKS)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    config.initializer_range = 0.5  # turns have likelihoods that differ
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    talks = {text: conversation(text, thinks=True) for text in ANSWERS}
    whole = [{"messages": talks[text], "score": score} for text, score in ANSWERS.items()]
    calls = [row for text, score in ANSWERS.items() for row in calls_of(talks[text], id="t", attempt=text, score=score)]
    for number, row in enumerate(calls):
        row["gain"] = number / 10
    rows = {"whole": [{"id": "t", "trajectories": whole}], "calls": calls}
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return {name: folder / f"{name}.jsonl" for name in rows}


def train(model: Path, data: Path, output: Path, *more: str) -> dict[str, Any]:
    settings = ("max_steps=1", "use_cpu=true", "logging_steps=1", "save_strategy=no", "seed=1")
    run("train", model, data, "--output", output, *more, *(word for item in settings for word in ("--set", item)))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if "loss" in line)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("loss", ["grpo", "dpo", "sft", "bradley_terry"])
def test_losses_read_attempts_in_both_forms_alike(
    loss: str, model: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = {name: train(model, path, tmp_path / name, "--loss", loss) for name, path in files.items()}
    said = capsys.readouterr()
    assert "3 of 3 trajectories are written in several token rows (6 more)" in said.out + said.err
    assert logged["whole"]["grad_norm"] > 0
    # The same sequences in the same order, so the same sums.
    for name in ("loss", "grad_norm"):
        assert logged["whole"][name] == logged["calls"][name]
    if loss == "dpo":
        # The policy is still the reference.
        assert math.isclose(logged["whole"]["loss"], math.log(2), abs_tol=1e-6)
        assert "of 1 groups of trajectories the best and the worst one are taken" in said.out + said.err


def test_policy_gradients_read_columns_by_turn(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    for setting in ("advantages=gain", "advantages=turn_scores"):
        logged = train(model, files["calls"], tmp_path / setting, "--loss", "grpo", "--loss-arg", setting)
        assert logged["grad_norm"] > 0


def scores_of(model: Path, data: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    run("score", model, data, "--output", output, *more)
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_score_is_per_attempt_and_reads_weights_of_turns(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    plain = scores_of(model, files["whole"], tmp_path / "plain.jsonl")
    row = json.loads(files["whole"].read_text())
    for attempt in row["trajectories"]:
        attempt["token_weights"] = [1, 0, 0, 0]
    data = tmp_path / "weighted.jsonl"
    data.write_text(json.dumps(row))
    weighted = scores_of(model, data, tmp_path / "scores.jsonl")
    # Three token rows each are one response, scored over all of its tokens.
    assert len(plain) == len(weighted) == 3
    for own, first in zip(plain, weighted, strict=True):
        assert own["num_tokens"] == first["num_tokens"]
        assert math.isclose(own["mean_logp"], own["sum_logp"] / own["num_tokens"], rel_tol=1e-6)
        # The first turn is the same in all attempts, so what it counts is, too.
        assert math.isclose(first["mean_logp"], weighted[0]["mean_logp"], rel_tol=1e-6)
        num_weighted = first["sum_logp"] / first["mean_logp"]
        assert math.isclose(num_weighted, round(num_weighted), abs_tol=1e-3)
        assert num_weighted < own["num_tokens"]


def test_score_takes_answers_to_one_history(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    rows = scores_of(model, files["whole"], tmp_path / "turns.jsonl", "--trajectory-groups", "turn")
    # The second turn is where the three attempts part.
    assert [(row["group"], row["response"]) for row in rows[:3]] == [(0, 0), (0, 1), (0, 2)]
    assert "turn 2" in rows[0]["id"]


def test_weights_from_the_data_change_what_is_learned(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    row = json.loads(files["whole"].read_text())
    for attempt in row["trajectories"]:
        attempt["token_weights"] = [0, 1, 0, 0]
    data = tmp_path / "weighted.jsonl"
    data.write_text(json.dumps(row))
    first, *_ = scores_of(model, data, tmp_path / "scores.jsonl")
    for schedule in ("full", "bounded"):
        output = tmp_path / schedule
        logged = train(model, data, output, "--loss", "sft", "--schedule", schedule)
        plain = train(model, files["whole"], tmp_path / f"{schedule}-plain", "--loss", "sft", "--schedule", schedule)
        assert logged["grad_norm"] > 0
        # Of the best attempt, the first, the second turn alone; float32, two orders of summation.
        assert math.isclose(logged["loss"], -first["mean_logp"], rel_tol=1e-4)
        assert not math.isclose(logged["loss"], plain["loss"], rel_tol=1e-3)
