"""Numbers by which two forwards of one token differ are refused in training, in every family that keeps them so."""

from __future__ import annotations

import pytest
from tiny_models import VOCAB_SIZE, build_model
from transformers import MixtralConfig, OPTConfig, PreTrainedConfig

from kvpref import UnsupportedModelError
from kvpref.models.support import check_training_state

_SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (OPTConfig(**_SIZES, ffn_dim=16, word_embed_proj_dim=16, dropout=0.1), "dropout 0.1"),
        (OPTConfig(**_SIZES, ffn_dim=16, word_embed_proj_dim=16, dropout=0.0, layerdrop=0.2), "layerdrop 0.2"),
        (
            MixtralConfig(
                **_SIZES, num_key_value_heads=2, num_local_experts=2, intermediate_size=16, router_jitter_noise=0.01
            ),
            "jitter noise 0.01",
        ),
    ],
    ids=["dropout", "layerdrop", "jitter"],
)
def test_refused_in_training_only(config: PreTrainedConfig, setting: str) -> None:
    model = build_model(config)
    with pytest.raises(UnsupportedModelError, match=setting):
        check_training_state(model)
    check_training_state(model.eval())


def test_none_is_found_where_all_are_off() -> None:
    check_training_state(build_model(OPTConfig(**_SIZES, ffn_dim=16, word_embed_proj_dim=16, dropout=0.0)))
