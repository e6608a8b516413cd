"""`attach(model, verify=True)`: unknown families are compared with their own forward before they are let in."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from sample_groups import pairs
from tiny_models import tiny_model
from torch import nn

import kvpref
from kvpref import UnsupportedModelError
from kvpref.models.families import FAMILIES


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model of a family that nobody has checked."""
    others = {name: family for name, family in FAMILIES.items() if name != "qwen3"}
    monkeypatch.setattr("kvpref.models.support.FAMILIES", others)
    return tiny_model("qwen3")


def test_without_verify_the_message_offers_it(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'qwen3' is not among .*attach\(model, verify=True\)"):
        kvpref.attach(model)


def test_verified_models_are_let_in_and_exact(model: nn.Module) -> None:
    truth = oracle.naive(oracle.twin(model), pairs())
    assert kvpref.attach(model, verify=True) is model
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    oracle.assert_same(oracle.shared(model, kvpref.collate(pairs(), min_shared_tokens=1)), truth, 1e-5)
    assert kvpref.attach(model) is model  # attached already


def mix_rows(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Every token sees the one before it in its row, whatever sequence that belongs to."""
    return output + 0.1 * output.roll(1, dims=1)


def own_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """The right numbers with another gradient in each call."""
    module.calls = getattr(module, "calls", 0) + 1
    factor = 1.0 / module.calls
    return output * factor + output.detach() * (1.0 - factor)


@pytest.mark.parametrize(("sabotage", "told"), [(mix_rows, "log-probs are off"), (own_gradient, "the gradient of")])
def test_models_that_differ_are_refused_and_left_as_they_were(model: Any, sabotage: Any, told: str) -> None:
    model.model.layers[0].mlp.down_proj.register_forward_hook(sabotage)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=rf"not computed exactly: .*{told}"):
        kvpref.attach(model, verify=True)
    assert model.config._attn_implementation == before
    assert "forward" not in model.__dict__
    assert model.training


def test_models_that_stop_are_refused_and_left_as_they_were(model: Any) -> None:
    def stop(module: nn.Module, args: Any) -> None:
        if args[0].shape[1] > 40:  # only passes hold so many tokens
            raise RuntimeError("too wide")

    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(stop)
    with pytest.raises(UnsupportedModelError, match="stops inside kvpref's passes: RuntimeError: too wide"):
        kvpref.attach(model, verify=True)
    assert "forward" not in model.__dict__
