"""`kvpref train --loss FILE.py:FUNCTION`, with columns of the data, and what a wrong loss is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command_line import environment
from command_line_in_process import fail, run
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SOURCE = """
import kvpref
import torch


@kvpref.loss(needs_reference=True, columns=["weight"])
def weighted(policy, reference, batch, *, beta=0.1):
    chosen, rejected = (policy.mean() - reference.mean()).view(-1, 2).unbind(1)
    weights = torch.tensor(batch.column("weight"))
    loss = -(weights * torch.nn.functional.logsigmoid(beta * (chosen - rejected))).mean()
    return kvpref.LossOutput(loss, {"weight": weights.mean(), "beta": beta})


def bare(policy, reference, batch):
    return -policy.mean().mean()


def vector(policy, reference, batch):
    return policy.sum()


def number(policy, reference, batch):
    return 3.0


def constant(policy, reference, batch):
    return policy.sum().mean().detach()


def metrics(policy, reference, batch):
    return kvpref.LossOutput(policy.sum().mean(), {"sums": policy.sum()})


def undefined(policy, reference, batch):
    return policy.sum().mean() * float("nan")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pairs_file: Path) -> Path:
    """A file of losses, and the pairs with weights."""
    path = tmp_path_factory.mktemp("custom")
    (path / "mine.py").write_text(SOURCE)
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    weighted = [row | {"weight": 0.5 + index % 3} for index, row in enumerate(rows)]
    (path / "weighted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in weighted))
    return path


def arguments(model: Path, data: Path, output: Path, loss: object) -> list[object]:
    return [
        *("train", model, data, "--output", output, "--loss", loss, "--max-steps", 2, "--logging-steps", 1),
        *("--learning-rate", 1e-2, "--batch-size", 4, "--set", "use_cpu=true"),
    ]


def test_a_run_repeats_from_its_run_file(
    folder: Path, trained_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    run(
        *arguments(trained_dir, folder / "weighted.jsonl", tmp_path / "out", "mine.py:weighted"), "--loss-arg", "beta=2"
    )
    saved = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["training"]
    assert (saved["loss"], saved["loss_args"]) == (f"{folder}/mine.py:weighted", {"beta": 2})
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["beta"] == 2
    assert 0.5 <= logged[0]["weight"] <= 2.5

    run("train", "--config", tmp_path / "out" / "run.yaml", "--output", tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(again[name], first[name]) for name in first)
    before = load_file(trained_dir / "model.safetensors")
    assert not all(torch.equal(before[name], first[name]) for name in first)


@pytest.mark.full
def test_torchrun_finds_the_file(folder: Path, trained_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--standalone", "-m", "kvpref"]
    command += map(str, arguments(trained_dir, folder / "weighted.jsonl", tmp_path / "out", "mine.py:weighted"))
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=1200, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_column_that_the_data_lacks_is_named(
    folder: Path, trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = f"{folder}/mine.py:weighted"
    error = fail(capsys, *arguments(trained_dir, pairs_file, tmp_path / "out", loss))
    assert f"{pairs_file}:1: missing column `weight`, which the loss reads; found prompt, chosen, rejected" in error


@pytest.mark.parametrize(
    ("loss", "code", "message"),
    [
        ("vector", 2, "loss 'vector' must return a scalar tensor as `loss`; it returned tensor("),
        ("number", 2, "loss 'number' must return a kvpref.LossOutput, or a scalar tensor; it returned float"),
        ("metrics", 2, "loss 'metrics': metric 'sums' must be a scalar tensor; it is tensor("),
        ("constant", 2, "loss 'constant' returned a loss without gradient"),
        ("undefined", 1, "loss 'undefined': the loss is nan at optimizer step 1: all log-probs are finite"),
    ],
)
def test_a_wrong_return_is_reported_with_the_name_of_the_loss(
    folder: Path,
    trained_dir: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    loss: str,
    code: int,
    message: str,
) -> None:
    wanted = f"{folder}/mine.py:{loss}"
    error = fail(capsys, *arguments(trained_dir, pairs_file, tmp_path / "out", wanted), code=code)
    assert message in error


def test_settings_and_missing_functions_are_bad_usage(
    folder: Path, trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, missing = f"{folder}/mine.py:bare", f"{folder}/mine.py:baer"
    error = fail(capsys, *arguments(trained_dir, pairs_file, tmp_path / "out", bare), "--loss-arg", "beta=1")
    assert error == f"error: loss '{bare}' has no setting 'beta'; it has: none"
    error = fail(capsys, *arguments(trained_dir, pairs_file, tmp_path / "out", missing))
    assert error.startswith(f"error: {folder}/mine.py has no 'baer'; it defines: weighted, bare")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_reads_values_gets_a_value_head_that_is_saved(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    groups = [
        {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]], "scores": [1, 0]} for row in rows
    ]
    data = tmp_path / "groups.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in groups))
    loss = "examples/actor_critic.py:actor_critic"
    run(*arguments(trained_dir, data, tmp_path / "first", loss))
    run(*arguments(tmp_path / "first", data, tmp_path / "second", loss))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first["value_head.weight"].abs().max() > 0
    # Trained further, not from zero: two more steps of AdamW move it by at most twice the learning rate and some.
    assert (second["value_head.weight"] - first["value_head.weight"]).abs().max() < 0.025
    errors = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["value_error"]
        for name in ("first", "second")
    ]
    assert errors[1] < errors[0]


def test_lora_trains_the_value_head_whole(trained_dir: Path, pairs_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra kvpref[peft]")
    path = tmp_path / "values.py"
    path.write_text(
        "import kvpref\n"
        "@kvpref.loss(values=True)\n"
        "def fit(policy, reference, batch):\n"
        "    return ((policy.values - 1) ** 2).mean() - policy.mean().mean()\n"
    )
    run(*arguments(trained_dir, pairs_file, tmp_path / "out", f"{path}:fit"), "--lora-r", 2)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    (value_head,) = [weight for name, weight in saved.items() if name.endswith("value_head.weight")]
    assert value_head.abs().max() > 0
