"""Positions that begin behind the padding's, as in models in the line of RoBERTa."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from sample_groups import pairs
from tiny_models import VOCAB_SIZE, build_model
from transformers import RobertaConfig

import kvpref
from kvpref import Group, Sequence, UnsupportedModelError
from kvpref.models.attach import attach

PADDING = 1


def roberta() -> Any:
    config = RobertaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PADDING,
        is_decoder=True,
    )
    return build_model(config, torch.float64)


def without_key_biases(result: oracle.Result) -> oracle.Result:
    """Their gradients vanish: a number that all keys share changes no softmax."""
    return oracle.Result(result.token_logps, {k: v for k, v in result.grads.items() if not k.endswith("key.bias")})


@pytest.mark.parametrize(
    "options",
    [{"mode": mode} for mode in ("two_pass", "one_pass", "packed", "padded")] + [{"schedule": "bounded"}],
    ids=str,
)
def test_positions_begin_behind_the_paddings(options: dict[str, Any]) -> None:
    model, groups = roberta(), pairs()
    truth = oracle.naive(oracle.twin(model), groups)
    found = oracle.scheduled(attach(model, listed_only=False), kvpref.collate(groups, min_shared_tokens=1), **options)
    oracle.assert_same(without_key_biases(found), without_key_biases(truth), 1e-10)


def test_tokens_that_the_model_takes_for_padding_are_refused() -> None:
    model = attach(roberta(), listed_only=False)
    odd = Group([Sequence.from_prompt_and_response([5, 6, PADDING, 7], [8, 9]), *pairs()[0].sequences])
    with pytest.raises(UnsupportedModelError, match=r"sequence 0 of group 1 holds token 1, which RobertaForCausalLM"):
        kvpref.response_logps(model, kvpref.collate([pairs()[0], odd], min_shared_tokens=1))
