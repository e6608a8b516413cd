"""Layers that see a window or a chunk, and models where layers of several kinds alternate: exact in every mode."""

from __future__ import annotations

import random
from typing import Any

import oracle
import pytest
import torch
from tiny_models import build_model
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import kvpref
from kvpref import Group, Sequence
from kvpref.models import families
from kvpref.ops.attention import fitting

FP64_TOLERANCE = 1e-10  # the same numbers summed in other orders

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "ministral": {"sliding_window": 5},
    "gemma3_text": {
        "sliding_window": 5,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "llama4_text": {
        "attention_chunk_size": 6,
        "num_hidden_layers": 4,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 24,
        "attn_temperature_tuning": False,
    },
}


def groups() -> list[Group]:
    """Prompts of 13, 7 and 3 tokens, two of them alike in the first 6; responses of 1 to 11, some alike at first."""
    generator = random.Random(0)

    def draw(num_tokens: int) -> list[int]:
        return [generator.randrange(3, 101) for _ in range(num_tokens)]

    long = draw(13)
    prompts = [long, long[:6] + draw(1), draw(3)]
    made = []
    for prompt, lengths in zip(prompts, [(11, 4, 1), (2, 9), (7, 5, 1, 3)], strict=True):
        begin = draw(2)
        responses = [begin + draw(length - 2) if length > 4 else draw(length) for length in lengths]
        made.append(Group([Sequence.from_prompt_and_response(prompt, response) for response in responses]))
    return made


@pytest.fixture(autouse=True)
def all_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are of rules, whatever else is known of a family."""
    for name in MODELS:
        monkeypatch.setitem(families.FAMILIES, name, families.Family())
        monkeypatch.delitem(families.REFUSED, name, raising=False)


def model_of(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    return build_model(CONFIG_MAPPING[name](**{**SIZES, **MODELS[name], **changes}), dtype)


WAYS: dict[str, dict[str, Any]] = {
    "two_pass": {"mode": "two_pass"},
    "one_pass": {"mode": "one_pass"},
    "packed": {"mode": "packed"},
    **{f"bounded {size}": {"schedule": "bounded", "max_tokens_per_chunk": size} for size in (3, 7, 64)},
}


def check(name: str, ways: list[dict[str, Any]]) -> None:
    model = model_of(name)
    truth = oracle.naive(oracle.twin(model), groups())
    kvpref.attach(model)
    batch = kvpref.collate(groups(), min_shared_tokens=1)
    for way in ways:
        oracle.assert_same(oracle.scheduled(model, batch, **way), truth, FP64_TOLERANCE)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", MODELS)
def test_exact_in_some_ways(name: str) -> None:
    place = list(MODELS).index(name)
    ways = list(WAYS.values())
    check(name, [ways[0] | {"checkpoint": "all"}, ways[1 + place % 2], ways[3 + place % 3]])


def test_a_batch_scored_in_inference_mode_can_be_trained_on() -> None:
    model = model_of("gemma3_text")
    truth = oracle.naive(oracle.twin(model), groups())
    kvpref.attach(model)
    batch = kvpref.collate(groups(), min_shared_tokens=1)
    fitting._squares.cache_clear()
    fitting._fitted.cache_clear()
    with torch.inference_mode():
        kvpref.response_logps(model, batch)
    oracle.assert_same(oracle.scheduled(model, batch), truth, FP64_TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("checkpoint", ["none", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_exact_in_every_way(name: str, checkpoint: str) -> None:
    check(name, [way | {"checkpoint": checkpoint} for way in WAYS.values()])


@pytest.mark.parametrize("name", ["qwen2", pytest.param("llama4_text", marks=pytest.mark.full)])
def test_the_models_own_checkpointing(name: str) -> None:
    model = model_of(name)
    truth = oracle.naive(oracle.twin(model), groups())
    oracle.checkpoint_layers(kvpref.attach(model))
    batch = kvpref.collate(groups(), min_shared_tokens=1)
    for way in ("one_pass", "two_pass", "bounded 7"):
        oracle.assert_same(oracle.scheduled(model, batch, **WAYS[way]), truth, FP64_TOLERANCE)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_rows_in_the_drop_in_switch(name: str, side: str) -> None:
    """Windows and chunks of a row count from its first token, wherever it stands."""
    model = model_of(name)
    rows = [list(sequence.input_ids) for group in groups() for sequence in group.sequences]
    width = max(map(len, rows))
    padding = [[0] * (width - len(row)) for row in rows]
    cells = zip(rows, padding, strict=True)
    input_ids = torch.tensor([row + pad if side == "right" else pad + row for row, pad in cells])
    real = input_ids != 0
    weights = torch.randn(len(rows), width, 101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run() -> oracle.Result:
        model.zero_grad(set_to_none=True)
        with oracle.true_float64():
            logits = model(input_ids=input_ids, attention_mask=real.long()).logits
            (logits * weights)[real].sum().backward()
        return oracle.Result(logits[real].detach(), oracle.grads_of(model))

    truth = run()
    with kvpref.shared_prefix(model, min_saved=0, min_saved_tokens=1, min_shared_tokens=1) as switch:
        found = run()
    assert switch.stats.num_served == 1, switch.stats
    oracle.assert_same(found, truth, FP64_TOLERANCE)


@pytest.mark.full  # of how layers are compiled, tests/models/test_compilation.py keeps the short tests
@pytest.mark.parametrize(
    ("name", "changes"), [("qwen2", {"num_hidden_layers": 2, "max_window_layers": 1}), ("mistral", {})]
)
def test_compiled_layers(name: str, changes: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = model_of(name, **changes)
    truth = oracle.naive(oracle.twin(model), groups())
    kvpref.compile_layers(kvpref.attach(model), backend="aot_eager")
    batch = kvpref.collate(groups(), min_shared_tokens=1)
    oracle.assert_same(oracle.scheduled(model, batch, mode="two_pass"), truth, FP64_TOLERANCE)
