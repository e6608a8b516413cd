"""Models to which the column of a row's first token matters: padding on the left is part of what they compute."""

from __future__ import annotations

import sys
from pathlib import Path

import oracle
import pytest
import torch
from padded_batches import one_prompt, padded, sharing_rows, switch_on

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["hunyuan_v1_dense", "llama4_text", "ministral3:temperature"])
def test_padding_counts(name: str, side: str) -> None:
    from census_models import build

    model = build(name).eval()
    with torch.no_grad(), switch_on(model) as switch:
        for rows in (sharing_rows(), [row[:42] for row in one_prompt()]):
            inputs = padded(rows, side, extra=2)
            found = model(**inputs).logits
            truth = oracle.twin(model)(**inputs).logits
            real = inputs["attention_mask"].bool()
            assert oracle.relative_error(found[real], truth[real]) < 1e-5
    if name == "llama4_text" and side == "left":
        assert dict(switch.stats.unserved) == {"padding that layers count": 2}
    else:
        assert switch.stats.num_served >= 1
