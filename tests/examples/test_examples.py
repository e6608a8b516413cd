"""The examples run as they stand, learn what they claim, and compute what their docstrings say."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import kvpref
from kvpref.data import load_processor
from kvpref.losses import as_loss

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# float64 scalars
TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def run_script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_every_example_is_run_here() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {
        "actor_critic",
        "coloured_shapes",
        "entropy_dpo",
        "order_desk",  # by tests/docs/test_agent_trajectories_page.py
        "shapes",
        "toy",
        "weighted_margin",
        "yes_no_judge",
    }


def test_weighted_margin_learns() -> None:
    logged = run_script("weighted_margin")["logged"]
    assert logged[-1]["loss"] < 0.2 * logged[0]["loss"]
    assert logged[-1]["gap"] > 0.8


def test_entropy_is_higher_where_it_is_paid_for() -> None:
    last = run_script("entropy_dpo")["last"]
    assert last[1.0]["entropy"] > last[0.0]["entropy"] + 0.05
    assert min(line["margin"] for line in last.values()) > 0.2


def test_values_come_to_predict_scores() -> None:
    logged = run_script("actor_critic")["logged"]
    # Half of the responses score 1: the best constant has an error of 0.25, values of zero one of 0.5.
    assert logged[0]["value_error"] == pytest.approx(0.5, abs=0.01)
    assert logged[-1]["value_error"] < 0.35


def test_pictures_are_drawn_trained_on_and_answered(tmp_path: Path) -> None:
    names = load("coloured_shapes")
    sizes = names["Sizes"](num_train=24, num_held_out=10, num_sft_steps=1, num_dpo_steps=1)
    result = names["run"](sizes, tmp_path)
    assert result["num_questions"] == 20
    assert (tmp_path / "result.png").is_file()
    assert load_processor(str(tmp_path / "model")).image_processor is not None


@pytest.mark.full
def test_colours_of_shapes_are_learned(tmp_path: Path) -> None:
    names = load("coloured_shapes")
    result = names["run"](
        names["Sizes"](num_train=800, num_held_out=100, num_sft_steps=200, num_dpo_steps=100), tmp_path
    )
    assert result["accuracy"]["start"] < 0.35
    assert result["accuracy"]["dpo"] > 0.45


def test_the_pages_figures_are_those_of_the_kept_result() -> None:
    root = EXAMPLES.parent
    kept = json.loads((root / "benchmarks" / "results" / "coloured_shapes.json").read_text())
    shares = " | ".join(f"{kept['accuracy'][stage]:.1%}" for stage in ("start", "sft", "dpo"))
    row = f"| right answers, {kept['num_questions']} held-out questions | {shares} |"
    assert row in (root / "docs" / "images.md").read_text()


def test_the_judge_learns_and_its_question_is_encoded_once() -> None:
    names = run_script("yes_no_judge")
    assert names["logged"][-1]["accuracy"] > 0.9
    batch = kvpref.collate(names["groups"][:1])
    assert batch.num_total_tokens - batch.num_unique_tokens >= 3 * 20
    assert batch.num_scored_tokens == batch.num_sequences


def make_batch(**columns: Any) -> kvpref.Batch:
    """Two pairs; the responses have 1, 2, 3 and 1 scored tokens."""
    sequences = [kvpref.Sequence.from_prompt_and_response([1, 2], list(range(3, 3 + size))) for size in (1, 2, 3, 1)]
    groups = [
        kvpref.Group(
            sequences[start : start + 2],
            scores=[1.0, 0.0],
            labels=[True, False],
            columns={name: values[start // 2] for name, values in columns.items()},
        )
        for start in (0, 2)
    ]
    return kvpref.collate(groups)


def make_logps(batch: kvpref.Batch, **extras: torch.Tensor) -> kvpref.ResponseLogps:
    token_logps = -torch.tensor([1.0, 2.0, 3.0, 0.5, 1.5, 1.0, 4.0], dtype=torch.float64)
    return kvpref.ResponseLogps(token_logps, batch.cu_seqlens, batch.group_index, **extras)


def test_weighted_margin_is_what_it_says() -> None:
    batch = make_batch(weight=[2.0, 0.5])
    output = as_loss(load("weighted_margin")["weighted_margin"])(make_logps(batch), None, batch)
    # Means per token: -1 and -2.5, then -1 and -4: gaps of 1.5 and 3 meet a margin of 1.
    assert output.loss.item() == 0
    wide = load("weighted_margin")["weighted_margin"](make_logps(batch), None, batch, margin=2.0)
    assert wide.loss.item() == pytest.approx((2.0 * 0.5 + 0.0) / 2, abs=TOLERANCE)
    assert output.metrics["gap"].item() == pytest.approx(2.25, abs=TOLERANCE)


def test_entropy_dpo_is_what_it_says() -> None:
    batch = make_batch()
    entropy = torch.tensor([0.5, 1.0, 2.0, 3.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    reference = make_logps(batch)._replace(token_logps=torch.zeros(7, dtype=torch.float64))
    loss = load("entropy_dpo")["entropy_dpo"](make_logps(batch, entropy=entropy), reference, batch, beta=0.1, alpha=0.3)
    margins = 0.1 * (-1 + 5), 0.1 * (-3 + 4)
    entropies = (0.5 + 1.5) / 2, (2.0 + 0.0) / 2
    expected = [math.log1p(math.exp(-m)) - 0.3 * e for m, e in zip(margins, entropies, strict=True)]
    assert loss.loss.item() == pytest.approx(sum(expected) / 2, abs=TOLERANCE)


def test_actor_critic_is_what_it_says() -> None:
    batch = make_batch()
    values = torch.tensor([0.5, 0.0, 1.0, 1.0, 0.0, 0.5, 0.25], dtype=torch.float64, requires_grad=True)
    policy = make_logps(batch, values=values)
    policy.token_logps.requires_grad_()
    output = load("actor_critic")["actor_critic"](policy, None, batch, value_weight=2.0)
    scores = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    lengths = [1, 2, 2, 3, 3, 3, 1]
    rows = list(zip(scores, values.tolist(), policy.token_logps.tolist(), lengths, strict=True))
    actor = sum(-(score - value) * logp / length for score, value, logp, length in rows) / 4
    critic = sum((score - value) ** 2 / length for score, value, _, length in rows) / 4
    assert output.loss.item() == pytest.approx(actor + 2 * critic, abs=1e-6)  # scores are float32
    output.loss.backward()
    # The values learn from their error alone, not from the advantage.
    expected = [-2 * 2 * (score - value) / length / 4 for score, value, _, length in rows]
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx(expected, abs=1e-6)
