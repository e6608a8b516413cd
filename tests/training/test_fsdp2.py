"""Sharded runs on gloo ranks give the losses and the weights of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fsdp2_cases import CASES, SAMPLED
from fsdp2_runs import NUM_GROUPS, train_case, varied_groups
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel
from two_processes import run_two_processes

import kvpref

pytest.importorskip("peft", reason="needs the extra kvpref[peft]")

WORKER = Path(__file__).with_name("fsdp2_worker.py")
# float64 throughout: only the order of sums differs. The trainer logs sums of float32 losses.
TOLERANCE = 1e-10
LOGGED = 1e-6
CHECKS = ("resumes", "stops_together", "starts_at_log_two", "is_not_evaluated_before", "repeats_together")
"""Of the worker's, in the same start."""


def compare(folder: Path, names: tuple[str, ...], num_ranks: int, checks: tuple[str, ...] = ()) -> None:
    run_two_processes(WORKER, folder / "ranks", *names, *checks, num_ranks=num_ranks)
    for name in names:
        train_case(folder / "one" / name, CASES[name])
        one, ranks = (folder / kind / name for kind in ("one", "ranks"))
        file = next(one.glob("*model.safetensors")).name
        expected, found = load_file(one / file), load_file(ranks / file)
        assert found.keys() == expected.keys(), name
        for weight, value in expected.items():
            error = (found[weight] - value).norm() / value.norm().clamp(min=1e-8)
            assert error < TOLERANCE, f"{name}: {weight}: relative error {error:.2e}"
        losses, own = (torch.tensor(json.loads((path / "losses.json").read_text())) for path in (one, ranks))
        assert len(losses) == 20
        assert torch.allclose(own, losses, rtol=LOGGED, atol=LOGGED), name


def fingerprint(output: Path) -> dict[str, str]:
    with safe_open(output / "reference_logps" / "train.safetensors", framework="pt") as file:
        found: dict[str, str] = file.metadata()
    return found


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    groups = varied_groups()
    passes = [len(kvpref.collate(part).plan("two_pass").passes) for part in (groups[::3], groups[1::3], groups[2::3])]
    assert passes == [1, 2, 3], "ranks must run different numbers of passes"
    assert NUM_GROUPS % 2, "and hold different numbers of groups"
    compare(tmp_path, SAMPLED, 2, CHECKS)
    one, ranks = (fingerprint(tmp_path / kind / SAMPLED[0]) for kind in ("one", "ranks"))
    assert one == ranks, "stored reference log-probs are read by any number of ranks"
    # Plain files: transformers' own model has the same log-probs.
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "ranks" / SAMPLED[0], dtype=torch.float64).eval()
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_whole_matrix(tmp_path: Path, num_ranks: int) -> None:
    compare(tmp_path, tuple(CASES), num_ranks)
