"""The benchmark of `shared_prefix`: which of its calls are served, and that what is saved is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvpref.integrations.shared_prefix.padded_plans import SharingWorth
from kvpref.profiling.timing import TimingOptions

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(("num_groups", "num_shared", "is_served"), [(4, 0, False), (1, 60, True)])
def test_a_call_is_served_where_something_is_shared(
    num_groups: int, num_shared: int, is_served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import shared_prefix

    model = LlamaForCausalLM(LlamaConfig(**{**shared_prefix.SIZES, "hidden_size": 32, "intermediate_size": 32}))
    case = shared_prefix.Case(
        num_rows=4, num_tokens=80, num_groups=num_groups, num_shared=num_shared, training=True, num_rounds=2
    )
    prefixes = torch.unique(case.batch()["input_ids"][:, :60], dim=0)
    assert len(prefixes) == num_groups
    row = shared_prefix.measure(model, case, TimingOptions(num_rounds=2))
    assert row["is_served"] is is_served
    assert row["share_saved"] == pytest.approx(60 * 3 / 320 if is_served else 0.0)
    assert row["ratio"] > 0


def test_the_bars_stand_where_it_was_measured_to_gain() -> None:
    """The docstring's figures are those kept, and above the bars every one is a gain."""
    bars = json.loads((BENCHMARKS / "results" / "shared_prefix.json").read_text())["bars"]
    stated = " ".join((SharingWorth.__doc__ or "").split())
    ratios: dict[tuple[int, int], list[float]] = {}
    for row in bars:
        num_saved = round(row["share_saved"] * row["num_rows"] * row["num_tokens"])
        ratios.setdefault((row["num_tokens"], num_saved), []).append(row["ratio"])
        if row["share_saved"] >= SharingWorth.min_saved and num_saved >= SharingWorth.min_saved_tokens:
            assert row["ratio"] < 0.97, row
    assert len(ratios) == 5
    for forward, training in ratios.values():
        assert f"{forward:.2f} and {training:.2f}" in stated
