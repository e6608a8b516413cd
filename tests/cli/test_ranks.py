"""`kvpref train` started by torchrun as users start it; what one process does is refused to several."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from command_line_in_process import fail, run
from preference_runs import make_args, make_model
from safetensors.torch import load_file
from two_processes import torchrun

from kvpref import InputError
from kvpref.ranks import check_all_joined, check_start

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUM_STEPS = 2


def write_pairs(path: Path, num_rows: int) -> Path:
    """Pairs of varied lengths."""
    generator = random.Random(0)

    def draw(low: int, high: int) -> str:
        return " ".join(generator.choice(WORDS) for _ in range(generator.randint(low, high)))

    rows = [{"prompt": draw(16, 30), "chosen": f" one {draw(1, 12)}", "rejected": f" two {draw(1, 12)}"}]
    rows += [
        {"prompt": draw(16, 30), **{key: f" {draw(2, 12)}" for key in rows[0] if key != "prompt"}}
        for _ in range(num_rows - 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_arguments(model: Path, data: Path, output: Path, **settings: Any) -> list[object]:
    """Plain SGD without clipping or decay, so that weights show the gradients."""
    fixed = {
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "sort_window_steps": 1,
        "warmup_steps": 0,
        "bf16": "false",
        **settings,
    }
    return [
        *("train", model, data, "--output", output, "--dtype", "auto", "--max-tokens", 120),
        *("--max-steps", NUM_STEPS, "--learning-rate", 0.5, "--logging-steps", 1),
        *(part for name, value in fixed.items() for part in ("--set", f"{name}={value}")),
    ]


def losses_of(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.full
@pytest.mark.slow
def test_torchrun_gives_what_one_process_gives(tmp_path: Path, tokenizer_dir: Path) -> None:
    # 6 groups per device on 2 ranks, 11 groups in all: the second step is incomplete and its ranks uneven.
    model, data = tmp_path / "model", write_pairs(tmp_path / "pairs.jsonl", 11)
    before = make_model()
    before.save_pretrained(model)
    tokenizer = ("--tokenizer", tokenizer_dir)
    torchrun(
        *("-m", "kvpref", *train_arguments(model, data, tmp_path / "two"), *tokenizer, "--batch-size", 6),
    )
    run(*train_arguments(model, data, tmp_path / "one"), *tokenizer, "--batch-size", 12)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    start = before.state_dict()
    for name, weight in expected.items():
        assert weight.dtype == torch.float64
        update, own = weight - start[name], found[name] - start[name]
        # float64 throughout: only the order of sums differs.
        assert (own - update).norm() <= 1e-10 * update.norm().clamp(min=1e-8), name
    assert max((weight - start[name]).abs().max() for name, weight in expected.items()) > 1e-3, "weights must move"
    # The trainer logs sums of float32 losses.
    assert len(losses_of(tmp_path / "one")) == NUM_STEPS
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-6)


@pytest.mark.parametrize("command", ["score", "check", "bench", "demo", "profile"])
def test_commands_of_one_process(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = {"score": ("m", "d.jsonl", "--output", tmp_path / "s.jsonl"), "profile": ("time",)}.get(command, ("m",))
    assert f"kvpref {command} runs in one process, and 2 were started" in fail(capsys, command, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says what a launcher said; nothing of it stays."""

    def start(**variables: int) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    yield start
    AcceleratorState._reset_state(reset_partial_state=True)


def test_without_an_accelerator_the_cpu_is_used(tmp_path: Path) -> None:
    args = make_args(str(tmp_path), use_cpu=False)
    assert args.use_cpu is not torch.accelerator.is_available()


def test_processes_that_cannot_find_one_another(tmp_path: Path, started: Any) -> None:
    started(WORLD_SIZE=2)
    with pytest.raises(InputError, match="RANK and LOCAL_RANK are not both set"):
        make_args(str(tmp_path))


def test_a_state_made_for_one_process(tmp_path: Path, started: Any) -> None:
    PartialState()
    started(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0)
    with pytest.raises(InputError, match=r"2 processes were started .* the trainer sees 1"):
        make_args(str(tmp_path), accelerator_config={"use_configured_state": True})


@pytest.mark.parametrize(
    ("num_devices", "variables", "is_refused"),
    [
        (2, {"LOCAL_WORLD_SIZE": 3}, True),
        (1, {"LOCAL_WORLD_SIZE": 2}, True),
        (2, {"LOCAL_WORLD_SIZE": 2}, False),
        (0, {"LOCAL_WORLD_SIZE": 2}, False),
        (1, {"LOCAL_WORLD_SIZE": 2, "CUDA_VISIBLE_DEVICES": 1}, False),  # each may see its own
    ],
)
def test_more_processes_than_devices(
    num_devices: int, variables: dict[str, int], is_refused: bool, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    started(WORLD_SIZE=3, RANK=0, LOCAL_RANK=0, **variables)
    if is_refused:
        with pytest.raises(InputError, match="each needs one"):
            check_start(num_devices)
    else:
        check_start(num_devices)


def test_processes_that_would_not_average(started: Any) -> None:
    """A process group that accelerate wraps no model for: its default on a CPU with ddp_backend=gloo."""
    started(WORLD_SIZE=2)
    with pytest.raises(InputError, match="gradients would not be averaged"):
        check_all_joined(2, is_distributed=False)
    check_all_joined(2, is_distributed=True)
