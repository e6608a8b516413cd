"""LoRA and its relatives: attach before or after wrapping, gradients of the adapters, and what is refused."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from sample_groups import five_levels, pairs
from tiny_models import tiny_model
from torch import nn

import kvpref
from kvpref import UnsupportedModelError

peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")

# Only the order of additions differs; see test_exactness.
FP64_TOLERANCE = 1e-10


def wrap(model: nn.Module, **options: Any) -> nn.Module:
    """LoRA with random adapters, the same for every call."""
    config = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 3, "init_lora_weights": False, **options}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config)).to(torch.float64)


def naive_lora(groups: list[kvpref.Group], **options: Any) -> oracle.Result:
    return oracle.naive(wrap(tiny_model("llama", torch.float64), **options), groups)


def attached_lora(order: str, **options: Any) -> nn.Module:
    model = tiny_model("llama", torch.float64)
    if order == "attach first":
        return wrap(kvpref.attach(model), **options)
    return kvpref.attach(wrap(model, **options))


ORDERS = ("attach first", "wrap first")


@pytest.mark.parametrize("mode", ["two_pass", "one_pass", "packed", "padded"])
@pytest.mark.parametrize("order", ORDERS)
def test_lora_gradients(order: str, mode: str) -> None:
    model = attached_lora(order)
    found = oracle.shared(model, kvpref.collate(five_levels(), min_shared_tokens=1), mode=mode)
    assert found.grads
    assert all("lora" in name for name in found.grads)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora" not in name)
    oracle.assert_same(found, naive_lora(five_levels()), FP64_TOLERANCE)


@pytest.mark.parametrize("order", ORDERS)
def test_lora_with_checkpointing(order: str) -> None:
    model = attached_lora(order)
    oracle.checkpoint_layers(model)
    found = oracle.shared(model, kvpref.collate(five_levels(), min_shared_tokens=1))
    oracle.assert_same(found, naive_lora(five_levels()), FP64_TOLERANCE)


@pytest.mark.parametrize("order", ORDERS)
def test_a_head_trained_whole_is_the_one_that_scores(order: str) -> None:
    options = {"modules_to_save": ["lm_head"]}
    model = attached_lora(order, **options)
    # The trained copy must differ from the frozen original, or the test could not tell them apart.
    doubled = wrap(tiny_model("llama", torch.float64), **options)
    for each in (model, doubled):
        with torch.no_grad():
            next(p for name, p in each.named_parameters() if "modules_to_save" in name).mul_(2)
    found = oracle.shared(model, kvpref.collate(pairs(), min_shared_tokens=1))
    oracle.assert_same(found, oracle.naive(doubled, pairs()), FP64_TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "lora and head"])
@pytest.mark.parametrize("order", ORDERS)
def test_disabled_adapters_give_the_base_model(order: str, options: dict[str, Any]) -> None:
    """How a trainer gets reference log-probs without a second model."""
    model = attached_lora(order, **options)
    batch = kvpref.collate(pairs(), min_shared_tokens=1)
    with torch.no_grad(), oracle.true_float64():
        with model.disable_adapter():
            reference = kvpref.response_logps(model, batch).token_logps
        truth = oracle.naive_token_logps(tiny_model("llama", torch.float64), pairs())
        assert oracle.relative_error(reference, truth) < FP64_TOLERANCE
        assert oracle.relative_error(kvpref.response_logps(model, batch).token_logps, truth) > 1e-3


@pytest.mark.parametrize("options", [{"mode": "packed"}, {"schedule": "bounded"}], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_an_adapter_on_the_head_takes_part(order: str, options: dict[str, Any]) -> None:
    """The fused log-probs read the head's weight, which does not include its adapter: the model's own forward does."""
    model = attached_lora(order, target_modules=["q_proj", "lm_head"])
    found = oracle.scheduled(model, kvpref.collate(pairs(), min_shared_tokens=1), **options)
    truth = naive_lora(pairs(), target_modules=["q_proj", "lm_head"])
    assert any("lm_head" in name and grad.any() for name, grad in found.grads.items())
    oracle.assert_same(found, truth, FP64_TOLERANCE)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused(method: str, order: str) -> None:
    config = getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=3)

    def run() -> None:
        if order == "attach first":
            model = peft.get_peft_model(kvpref.attach(tiny_model("llama")), config)
            kvpref.response_logps(model, kvpref.collate(pairs()))
        else:
            kvpref.attach(peft.get_peft_model(tiny_model("llama"), config))

    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        run()


def test_lora_dropout_is_refused_in_training() -> None:
    model = attached_lora("wrap first", lora_dropout=0.1)
    with pytest.raises(UnsupportedModelError, match="lora_dropout"):
        kvpref.response_logps(model, kvpref.collate(pairs()))
    kvpref.response_logps(model.eval(), kvpref.collate(pairs()))
