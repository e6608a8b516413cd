"""`attach(model, verify=True)`: unknown families are compared with their own forward before they are let in."""

from __future__ import annotations

from functools import partial
from typing import Any

import oracle
import pytest
import torch
from sample_groups import pairs
from tiny_models import VOCAB_SIZE, build_model, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoConfig, RecurrentGemmaConfig

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


def test_padded_only_lets_in_what_mode_padded_computes_exactly() -> None:
    """Everything else refuses the model, and says that mode `padded` would do."""
    config = GPTNeoConfig(
        **{"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_heads": 2, "num_layers": 2, "max_position_embeddings": 64},
        **{"attention_types": [[["global", "local"], 1]], "window_size": 5, "resid_dropout": 0.0, "embed_dropout": 0.0},
        **{"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2},
    )
    model = build_model(config)
    truth = oracle.naive(oracle.twin(model), pairs())
    for refuse in (kvpref.attach, kvpref.shared_prefix, partial(kvpref.attach, verify=True)):
        with pytest.raises(UnsupportedModelError, match=r"'gpt_neo'.*mode 'padded', ordinary training, is exact"):
            refuse(model)
    kvpref.attach(model, padded_only=True)
    batch = kvpref.collate(pairs(), min_shared_tokens=1)
    oracle.assert_same(oracle.shared(model, batch, mode="padded"), truth, 1e-5)
    for changes in ({}, {"mode": "one_pass"}, {"mode": "packed"}, {"schedule": "bounded"}):
        with pytest.raises(UnsupportedModelError, match="mode 'padded', ordinary training, is exact"):
            kvpref.forward_backward(model, batch, oracle.weighted_loss, **changes)


def test_padded_only_changes_nothing_for_others() -> None:
    model = kvpref.attach(tiny_model("llama"), padded_only=True)
    truth = oracle.naive(tiny_model("llama"), pairs())
    oracle.assert_same(oracle.shared(model, kvpref.collate(pairs(), min_shared_tokens=1)), truth, 1e-5)
    with pytest.raises(UnsupportedModelError, match="recurrent"):
        kvpref.attach(
            AutoModelForCausalLM.from_config(
                RecurrentGemmaConfig(
                    vocab_size=16,
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    lru_width=16,
                )
            ),
            padded_only=True,
        )
