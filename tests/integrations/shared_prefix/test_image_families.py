"""Every family whose pixel inputs are taken apart, on the census's tiny models: a padded call inside and outside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from census_calls import model_and_call, split_families
from padded_batches import switch_on
from transformers import PreTrainedModel

import kvpref

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
# Their outermost forward hands embeddings to what shared_prefix looks at.
UNSERVED = ("llama4",)


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def step(model: PreTrainedModel, call: dict[str, Any]) -> oracle.Result:
    """Logits of real tokens, and every gradient."""
    model.zero_grad(set_to_none=True)
    output = model(**call)
    output.loss.backward()
    return oracle.Result(output.logits[call["attention_mask"].bool()].detach(), oracle.grads_of(model))


@pytest.mark.parametrize("name", split_families(but=UNSERVED))
def test_a_padded_call(name: str) -> None:
    model, call = model_and_call(name)
    truth = step(model, call)
    with switch_on(model) as shared:
        found = step(model, call)
    assert shared.stats.num_served == 1, shared.stats
    # fp32, sums in another order; gradients that are zero but for rounding are compared with the largest.
    assert oracle.relative_error(found.token_logps, truth.token_logps) < 1e-4
    largest = max(float(grad.norm()) for grad in truth.grads.values())
    for key, grad in truth.grads.items():
        assert float((found.grads[key] - grad).norm()) < 1e-3 * float(grad.norm()) + 1e-5 * largest, key


@pytest.mark.parametrize("name", UNSERVED)
def test_a_call_that_runs_unchanged(name: str) -> None:
    model, call = model_and_call(name)
    with torch.no_grad(), switch_on(model) as shared:
        model(**call)
    assert dict(shared.stats.unserved) == {"inputs_embeds": 1}


def test_a_family_whose_prompts_see_both_ways_is_refused() -> None:
    from census_images import build_with_tower

    with pytest.raises(kvpref.UnsupportedModelError, match="all tokens of a prompt see one another"):
        switch_on(build_with_tower("paligemma"))
