"""Refusals: by name, with the reason and what works instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sample_groups import pairs
from tiny_models import VOCAB_SIZE, build_model, tiny_config, tiny_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BloomConfig,
    FalconConfig,
    GPTJConfig,
    LlamaModel,
    MptConfig,
    RwkvConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ENTRIES

import kvpref
from kvpref import UnsupportedModelError
from kvpref.models.families import FAMILIES, REFUSED
from kvpref.models.vision.families import VISION, WITHOUT_IMAGES

_SMALL: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 1}
UNSUPPORTED = {
    "falcon": FalconConfig(**_SMALL, num_attention_heads=2),
    "gptj": GPTJConfig(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=1, n_head=2, rotary_dim=4),
    "bloom": BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=16, n_layer=1, n_head=2),
    "rwkv": RwkvConfig(**{**_SMALL, "num_hidden_layers": 2}, attention_hidden_size=16),
    "mpt": MptConfig(vocab_size=VOCAB_SIZE, d_model=16, n_layers=1, n_heads=2),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_architectures_are_refused_by_name(name: str) -> None:
    model = build_model(UNSUPPORTED[name])
    with pytest.raises(UnsupportedModelError) as error:
        kvpref.attach(model)
    message = str(error.value)
    assert repr(name) in message
    assert f"nearest supported family: {REFUSED[name].nearest}" in message
    assert model.config._attn_implementation != "kvpref"
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("name", REFUSED)
def test_every_refusal_names_a_real_type_and_a_supported_neighbour(name: str) -> None:
    assert name in CONFIG_MAPPING_NAMES or name not in ENTRIES  # older releases lack some
    assert REFUSED[name].nearest in {**FAMILIES, **VISION}
    assert name not in {**FAMILIES, **VISION, **WITHOUT_IMAGES}


def test_models_without_a_language_model_head_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no language-model head"):
        kvpref.attach(LlamaModel(tiny_config("llama")))


def test_classifiers_of_several_labels_are_refused() -> None:
    model = AutoModelForSequenceClassification.from_config(tiny_config("llama"))
    with pytest.raises(UnsupportedModelError, match=r"with 2 labels is not a reward model.*num_labels=1"):
        kvpref.attach(model)


def test_something_else_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="got Linear"):
        kvpref.attach(nn.Linear(2, 2))


def test_custom_code_is_refused() -> None:
    model = tiny_model("llama")
    custom = type("LlamaForCausalLM", (type(model),), {"__module__": "transformers_modules.somebody.modeling"})
    model.__class__ = custom
    with pytest.raises(UnsupportedModelError, match="trust_remote_code=False"):
        kvpref.attach(model)


@pytest.mark.parametrize("mode", ["two_pass", "one_pass", "packed", "padded"])
@pytest.mark.parametrize(
    ("variant", "setting"),
    [
        ("llama", "attention_dropout"),
        ("gpt_neox", "attention_dropout"),
        ("gpt_neox", "hidden_dropout"),
        ("stablelm", "attention_dropout"),
        ("stablelm", "hidden_dropout"),
        ("phi3", "resid_pdrop"),
        ("gpt2", "attn_pdrop"),
        ("gpt2", "embd_pdrop"),
    ],
)
def test_dropout_is_refused_in_training_and_allowed_in_eval(variant: str, setting: str, mode: str) -> None:
    model = kvpref.attach(tiny_model(variant, **{setting: 0.5}))
    batch = kvpref.collate(pairs(), min_shared_tokens=1)
    with pytest.raises(UnsupportedModelError, match=r"dropout 0\.5"):
        kvpref.response_logps(model, batch, mode=mode)
    found = kvpref.response_logps(model.eval(), batch, mode=mode).token_logps
    plain = kvpref.response_logps(kvpref.attach(tiny_model(variant)).eval(), batch, mode=mode).token_logps
    assert torch.equal(found, plain)
