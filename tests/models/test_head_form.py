"""Which transform lies before the logits: read from the config's names, proved by comparing logits."""

from __future__ import annotations

from typing import Any

import odd_heads
import pytest
import torch
from sample_groups import pairs
from tiny_models import build_model, tiny_config, tiny_model
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, CohereConfig, HyperCLOVAXConfig

import kvpref
from kvpref.models.head_form import OWN_FORWARD, HeadForm, head_form, verify_head

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def form_of(model: Any) -> HeadForm:
    verify_head(model)
    return head_form(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_granite_divides_and_hyperclova_multiplies(scale: float, dtype: torch.dtype) -> None:
    granite = form_of(tiny_model("granite", dtype, logits_scaling=scale))
    assert granite == HeadForm(fused=True, logit_scale=1.0 / scale)
    hyperclova = build_model(HyperCLOVAXConfig(**SIZES, logits_scaling=scale), dtype)
    assert form_of(hyperclova) == HeadForm(fused=True, logit_scale=scale)


def test_cohere_keeps_its_scale_in_logit_scale() -> None:
    assert form_of(build_model(CohereConfig(**SIZES))) == HeadForm(fused=True, logit_scale=0.0625)


def test_a_scale_that_the_forward_does_not_use_is_not_believed() -> None:
    config = tiny_config("llama")
    config.logits_scaling = 8.0
    assert form_of(build_model(config)) == HeadForm(fused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_softcap_far_above_the_logits_is_seen(dtype: torch.dtype) -> None:
    """Logits of a new model are small beside a cap of 30, and would agree with none."""
    model = tiny_model("gemma2", dtype)
    model.config.final_logit_softcapping = 30.0
    assert form_of(model) == HeadForm(fused=True, softcap=30.0)


def test_a_softcap_that_the_config_does_not_name_goes_through_the_models_own_forward() -> None:
    assert form_of(odd_heads.with_logits(odd_heads.softcapped)) == OWN_FORWARD
    assert form_of(tiny_model("gemma2", final_logit_softcapping=None)) == HeadForm(fused=True)


def test_models_without_weights_take_the_form_that_their_config_speaks_of() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("granite", logits_scaling=8.0))
    assert form_of(model) == HeadForm(fused=True, logit_scale=0.125)
    with FakeTensorMode():
        assert form_of(AutoModelForCausalLM.from_config(tiny_config("llama"))) == HeadForm(fused=True)


def test_a_head_replaced_after_attaching_is_not_read_as_a_linear_layer() -> None:
    model = kvpref.attach(tiny_model("llama"))
    before = kvpref.response_logps(model, kvpref.collate(pairs())).token_logps
    plain = model.lm_head
    model.lm_head = torch.nn.Sequential(plain)
    assert head_form(model) == OWN_FORWARD
    torch.testing.assert_close(kvpref.response_logps(model, kvpref.collate(pairs())).token_logps, before)
