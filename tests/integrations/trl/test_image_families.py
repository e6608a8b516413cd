"""What TRL's trainers call, on every family whose pixel inputs are taken apart, against the model's own forward."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs the extra kvpref[trl]")

import oracle  # noqa: E402
from census_calls import model_and_call, split_families  # noqa: E402

from kvpref.integrations.trl.forwards import add_shared_prompt_head  # noqa: E402
from kvpref.integrations.trl.refusals import REFUSALS  # noqa: E402
from kvpref.integrations.trl.setup import Setup  # noqa: E402

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


@pytest.mark.parametrize("name", split_families())
def test_log_probs_and_every_gradient(name: str) -> None:
    # Llama 4's layers count the columns, padding before a row too.
    model, call = model_and_call(name, side="right" if name == "llama4" else "left")
    labels = call.pop("labels")
    setup = Setup.from_arguments("DPOTrainer", {"model": model})
    assert not [row.name for row in REFUSALS if row.applies(setup) and "DPOTrainer" in row.trainers]
    scored = labels[:, 1:] != -100
    weights = torch.linspace(-1, 1, scored.numel()).view(scored.shape)
    own = model(**call, use_cache=False).logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))
    truth = own.squeeze(2) * scored
    (truth * weights).sum().backward()
    grads = oracle.grads_of(model)
    model.zero_grad(set_to_none=True)
    add_shared_prompt_head(model, mode="two_pass")
    found = model(**call, labels=labels, fused_lm_head=True).log_probs
    (found * weights).sum().backward()
    # fp32, sums in another order; gradients that are zero but for rounding are compared with the largest.
    assert oracle.relative_error(found.detach(), truth.detach()) < 1e-4
    largest = max(float(grad.norm()) for grad in grads.values())
    for key, grad in oracle.grads_of(model).items():
        assert float((grads[key] - grad).norm()) < 1e-3 * float(grad.norm()) + 1e-5 * largest, key
