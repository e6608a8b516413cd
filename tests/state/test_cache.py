"""The prefix cache: encode once, score many times, hold each key and value exactly once."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import pytest
import torch
from sample_groups import SCENARIOS, pairs, single_responses, story_questions_answers, tokens
from tiny_models import tiny_model
from torch import nn

import kvpref
from kvpref import Group, InputError, Sequence

# Only the order of additions differs; see test_exactness.
FP64_TOLERANCE = 1e-10


def score_in_two_calls(model: nn.Module, groups: list[Group], num_uses: int) -> oracle.Result:
    """encode_prefix once, score_responses `num_uses` times; the loss is the mean of the uses."""
    batch = kvpref.collate(groups, min_shared_tokens=1)
    model.zero_grad(set_to_none=True)
    with oracle.true_float64():
        cache = kvpref.encode_prefix(model, batch)
        uses = [kvpref.score_responses(model, batch, cache).token_logps for _ in range(num_uses)]
        for logps in uses[1:]:
            assert torch.equal(logps, uses[0])
        weights = oracle.loss_weights(groups)
        (torch.stack(uses).mean(0) * weights).sum().backward()
    return oracle.Result(uses[0].detach(), oracle.grads_of(model))


@pytest.mark.parametrize("num_uses", [1, 2])
@pytest.mark.parametrize("scenario", ["pairs", "five_levels", "single_responses", "different_scoring"])
def test_encode_then_score_equals_the_oracle(scenario: str, num_uses: int) -> None:
    model = tiny_model("llama", torch.float64)
    truth = oracle.naive(oracle.twin(model), SCENARIOS[scenario]())
    oracle.assert_same(score_in_two_calls(kvpref.attach(model), SCENARIOS[scenario](), num_uses), truth, FP64_TOLERANCE)


def test_encode_then_score_with_checkpointing() -> None:
    model = tiny_model("llama", torch.float64)
    truth = oracle.naive(oracle.twin(model), story_questions_answers())
    oracle.checkpoint_layers(kvpref.attach(model))
    oracle.assert_same(score_in_two_calls(model, story_questions_answers(), 2), truth, FP64_TOLERANCE)


def test_recomputation_does_not_grow_the_cache() -> None:
    """A layer that runs again in the backward pass must read the cache only."""
    model = oracle.checkpoint_layers(kvpref.attach(tiny_model("llama")))
    batch = kvpref.collate(story_questions_answers(), min_shared_tokens=1)
    cache = kvpref.encode_prefix(model, batch)
    num_bytes = cache.num_bytes
    kvpref.score_responses(model, batch, cache).token_logps.sum().backward()
    assert cache.num_bytes == num_bytes
    assert [len(layer.slabs) for layer in cache.layers] == [1, 1]


def test_scoring_does_not_change_the_cache() -> None:
    model = kvpref.attach(tiny_model("llama"))
    batch = kvpref.collate(story_questions_answers(), min_shared_tokens=1)
    cache = kvpref.encode_prefix(model, batch)
    before = (cache.num_passes, cache.num_bytes, [len(layer.slabs) for layer in cache.layers])
    kvpref.score_responses(model, batch, cache)
    assert before == (cache.num_passes, cache.num_bytes, [len(layer.slabs) for layer in cache.layers])
    assert before[0] == 1


def test_another_batchs_cache_is_refused() -> None:
    """Same shapes, other tokens: nothing but a look at the tokens can tell."""
    model = kvpref.attach(tiny_model("llama"))
    for groups in (pairs(), single_responses()):
        renamed = [
            Group([Sequence([token % 90 + 5 for token in s.input_ids], s.scored) for s in group.sequences])
            for group in groups
        ]
        cache = kvpref.encode_prefix(model, kvpref.collate(groups, min_shared_tokens=1))
        with pytest.raises(InputError, match="another batch"):
            kvpref.score_responses(model, kvpref.collate(renamed, min_shared_tokens=1), cache)


def test_same_tokens_scored_differently_are_refused() -> None:
    model = kvpref.attach(tiny_model("llama"))
    prompt, responses = tokens(5, 1), [tokens(3, 2), tokens(4, 3)]
    scored = Group([Sequence.from_prompt_and_response(prompt, response) for response in responses])
    all_scored = Group([Sequence(s.input_ids, [False] + [True] * (len(s) - 1)) for s in scored.sequences])
    cache = kvpref.encode_prefix(model, kvpref.collate([scored], min_shared_tokens=1))
    with pytest.raises(InputError, match="another batch"):
        kvpref.score_responses(model, kvpref.collate([all_scored], min_shared_tokens=1), cache)


def test_an_equal_batch_may_use_the_cache() -> None:
    model = kvpref.attach(tiny_model("llama"))
    cache = kvpref.encode_prefix(model, kvpref.collate(pairs(), min_shared_tokens=1))
    again = kvpref.collate(pairs(), min_shared_tokens=1)
    found = kvpref.score_responses(model, again, cache).token_logps
    assert torch.equal(found, kvpref.response_logps(model, again).token_logps)


def test_another_models_cache_and_an_empty_cache_are_refused() -> None:
    model = kvpref.attach(tiny_model("llama"))
    batch = kvpref.collate(pairs(), min_shared_tokens=1)
    cache = kvpref.encode_prefix(copy.deepcopy(model), batch)
    with pytest.raises(InputError, match="another model"):
        kvpref.score_responses(model, batch, cache)
    with pytest.raises(InputError, match="another batch"):
        kvpref.score_responses(model, batch, kvpref.PrefixCache())


def test_a_prefix_cache_is_not_for_ordinary_forwards() -> None:
    model = kvpref.attach(tiny_model("llama")).eval()
    cache = kvpref.encode_prefix(model, kvpref.collate(pairs(), min_shared_tokens=1))
    with pytest.raises(NotImplementedError, match=r"kvpref\.score_responses"):
        model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["llama", "gemma", "gpt2", "phi3"])
def test_num_bytes_is_that_of_the_unique_prefix_tokens(variant: str, dtype: torch.dtype) -> None:
    model = kvpref.attach(tiny_model(variant, dtype))
    config = model.config
    num_prefix_tokens = 7 + 11 + 3  # the prompts of `pairs`, each once
    num_kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = kvpref.encode_prefix(model, kvpref.collate(pairs(), min_shared_tokens=1, max_depth=1))
    expected = 2 * config.num_hidden_layers * num_kv_heads * head_dim * num_prefix_tokens * dtype.itemsize
    assert cache.num_bytes == expected
    assert len(cache.layers) == config.num_hidden_layers
    tensors = [tensor for layer in cache.layers for slab in layer.slabs for tensor in slab]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    assert sum(storage.nbytes() for storage in storages.values()) == expected


class SavedTensors:
    """Records every tensor that autograd saves, and keeps it alive so that no address is used twice."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.tensors.append(tensor)
        return tensor

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def storages_holding(self, slab: torch.Tensor) -> set[int]:
        """Addresses of storages that hold the values of `slab` (T, G, D), in any layout, expanded or not."""
        values = slab.detach().flatten().sort().values
        found = set()
        for tensor in self.tensors:
            distinct = tensor.detach().flatten().sort().values
            if tensor.numel() % slab.numel() == 0 and tensor.dtype == slab.dtype:
                repeats = tensor.numel() // slab.numel()
                if repeats and torch.equal(distinct[::repeats], values):
                    found.add(tensor.untyped_storage().data_ptr())
        return found

    def num_bytes(self) -> int:
        """Bytes of all distinct storages."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self.tensors}
        return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("variant", ["llama", "stablelm:parallel", "gpt2"])
def test_prefix_keys_and_values_are_saved_once(variant: str) -> None:
    """One storage each, the cache's own: no expansion over heads or responses, no second copy for pass 1."""
    model = kvpref.attach(tiny_model(variant))
    prompt = tokens(13, 1)
    group = Group([Sequence.from_prompt_and_response(prompt, tokens(2 + i, 10 + i)) for i in range(5)])
    batch = kvpref.collate([group], min_shared_tokens=2)
    with SavedTensors() as saved:
        cache = kvpref.encode_prefix(model, batch)
        kvpref.score_responses(model, batch, cache)
    for layer in cache.layers:
        for slab in layer.slabs[0]:
            assert slab.shape[0] == len(prompt)
            assert saved.storages_holding(slab) == {slab.untyped_storage().data_ptr()}


def saved_bytes(num_prompt_tokens: int, num_responses: int, mode: str) -> int:
    model = kvpref.attach(tiny_model("llama"))
    responses = [[3 + i, *tokens(5, i)] for i in range(num_responses)]
    group = Group([Sequence.from_prompt_and_response(tokens(num_prompt_tokens, 99), r) for r in responses])
    with SavedTensors() as saved:
        kvpref.response_logps(model, kvpref.collate([group]), mode=mode)
    return saved.num_bytes()


@pytest.mark.parametrize("mode", ["two_pass", "one_pass", "packed"])
def test_saved_memory_per_response_does_not_depend_on_the_prompt(mode: str) -> None:
    """Bytes that 8 more responses add behind a prompt of 20 tokens and of 80; `packed` shows that the test can fail."""
    short, long = (saved_bytes(size, 16, mode) - saved_bytes(size, 8, mode) for size in (20, 80))
    if mode == "packed":
        assert long > 2 * short
    else:
        assert long == short
