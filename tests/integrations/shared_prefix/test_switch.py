"""Switching `shared_prefix` on and off leaves no trace, in whatever order others patch the model."""

from __future__ import annotations

import copy
import inspect
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from padded_batches import one_prompt, padded, switch_on
from tiny_models import tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, BloomConfig, LlamaModel

import kvpref
from kvpref import InputError, UnsupportedModelError
from kvpref.models.attach import is_attached


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """What a switch could leave behind: instance attributes, hooks and the attention's name."""
    return [
        (name, sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks), attention(module))
        for name, module in model.named_modules()
    ]


def attention(module: nn.Module) -> str | None:
    return getattr(module.__dict__.get("config"), "_attn_implementation", None)


def num_served(model: nn.Module, switch: Any) -> int:
    """How many more calls are served when the model runs once."""
    before = switch.stats.num_served
    with torch.no_grad():
        model(**padded(one_prompt()))
    return switch.stats.num_served - before


@pytest.mark.parametrize("attached", [False, True])
def test_closing_undoes_everything(attached: bool) -> None:
    model = tiny_model("llama")
    model = kvpref.attach(model) if attached else model
    before, config = state(model), model.config
    switch = switch_on(model)
    assert num_served(model, switch) == 1
    switch.close()
    switch.close()
    assert num_served(model, switch) == 0
    assert state(model) == before
    assert model.config is config


def test_an_error_inside_undoes_everything() -> None:
    model = tiny_model("llama")
    before = state(model)

    def fail(*args: Any) -> None:
        raise RuntimeError("from a layer")

    handle = model.base_model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="from a layer"), switch_on(model):
        model(**padded(one_prompt()))
    handle.remove()
    assert state(model) == before


def test_an_error_in_a_served_call_leaves_the_switch_on() -> None:
    model = tiny_model("llama")
    with switch_on(model) as switch:
        handle = model.base_model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**padded(one_prompt()))
        handle.remove()
        assert attention(model) == "eager"
        assert num_served(model, switch) == 1


@pytest.mark.parametrize("inner_first", [True, False])
def test_of_two_switches_the_later_one_serves(inner_first: bool) -> None:
    model = tiny_model("llama")
    before = state(model)
    outer, inner = switch_on(model), switch_on(model)
    assert num_served(model, inner) == 1
    assert outer.stats.num_calls == 0
    first, second = (inner, outer) if inner_first else (outer, inner)
    first.close()
    assert num_served(model, second) == 1
    second.close()
    assert state(model) == before


def test_a_patch_put_over_the_switch_stays_and_works() -> None:
    model = tiny_model("llama")
    switch = switch_on(model)
    below, calls = model.forward, []

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return below(*args, **kwargs)

    model.forward = patched
    assert num_served(model, switch) == 1
    switch.close()
    assert model.forward is patched
    assert num_served(model, switch) == 0
    assert len(calls) == 2
    assert "forward" not in model.base_model.__dict__


def test_a_patch_under_the_switch_is_called_and_comes_back() -> None:
    model = tiny_model("llama")
    below, calls = model.forward, []

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return below(*args, **kwargs)

    model.forward = patched
    with switch_on(model) as switch:
        assert num_served(model, switch) == 1
        assert len(calls) == 1
    assert model.forward is patched


def test_attaching_inside() -> None:
    model = tiny_model("llama")
    with switch_on(model) as switch:
        kvpref.attach(model)
        assert num_served(model, switch) == 1
    assert num_served(model, switch) == 0
    groups = [kvpref.Group([kvpref.Sequence.from_prompt_and_response(row[:40], row[40:]) for row in one_prompt()])]
    found = kvpref.response_logps(model, kvpref.collate(groups)).token_logps
    truth = kvpref.response_logps(kvpref.attach(tiny_model("llama")), kvpref.collate(groups)).token_logps
    assert torch.equal(found, truth)


def test_the_signature_is_the_models() -> None:
    """Trainers drop the data's columns that `forward` does not name."""
    model = tiny_model("llama")
    before = inspect.signature(model.forward)
    with switch_on(model):
        assert inspect.signature(model.forward) == before


@pytest.mark.parametrize("attached", [False, True])
def test_copies_do_not_share_prefixes(attached: bool) -> None:
    model = tiny_model("llama")
    model = kvpref.attach(model) if attached else model
    plain = copy.deepcopy(model)
    with switch_on(model) as switch:
        copied = copy.deepcopy(model)
        with torch.no_grad():
            copied.lm_head.weight.mul_(2.0)
        assert num_served(copied, switch) == 0
        assert num_served(model, switch) == 1
    inputs = padded(one_prompt())
    assert torch.equal(copied(**inputs).logits, 2 * plain(**inputs).logits)
    with switch_on(copied) as switch:
        assert num_served(copied, switch) == 1
    assert is_attached(copied) == attached


def test_pickles_and_checkpoints_do_not_share_prefixes(tmp_path: Path) -> None:
    model = tiny_model("llama").eval()
    buffer = io.BytesIO()
    with switch_on(model) as switch:
        torch.save(model, buffer)
        model.save_pretrained(tmp_path)
    buffer.seek(0)
    inputs = padded(one_prompt())
    loaded = torch.load(buffer, weights_only=False)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for other in (loaded, saved):
        assert num_served(other, switch) == 0
        assert torch.equal(other(**inputs).logits, model(**inputs).logits)


def test_models_that_share_a_config_keep_their_attention() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    for module in other.modules():
        if "config" in module.__dict__:
            module.config = model.config
    with switch_on(model) as switch:
        assert num_served(model, switch) == 1
        assert attention(other) == "eager"


def test_compiled_calls_run_unchanged() -> None:
    """While the model is traced no values are known."""
    model = tiny_model("llama").eval()
    inputs = padded(one_prompt())
    with torch.no_grad(), switch_on(model) as switch:
        compiled = torch.compile(model, backend="eager")
        found = compiled(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(found, model(**inputs).logits)
    assert switch.stats.num_served == 0


def test_models_that_can_never_be_served_are_refused_at_once() -> None:
    config = tiny_config("llama")
    for model in (LlamaModel(config), AutoModelForTokenClassification.from_config(config)):
        with pytest.raises(UnsupportedModelError, match="no language-model head"):
            kvpref.shared_prefix(model)
        assert "forward" not in model.__dict__
    bloom = BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(UnsupportedModelError, match="attention interface"):
        kvpref.shared_prefix(AutoModelForCausalLM.from_config(bloom))
    with pytest.raises(UnsupportedModelError, match="got Linear"):
        kvpref.shared_prefix(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_saved": 1.0}, "min_saved must be at least 0 and less than 1; got 1.0"),
        ({"min_saved_tokens": 0}, "min_saved_tokens must be at least 1; got 0"),
        ({"min_shared_tokens": 0}, "min_shared_tokens must be at least 1; got 0"),
        ({"backend": "fast"}, "unknown attention backend 'fast'.*reference"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kvpref.shared_prefix(tiny_model("llama"), **options)
