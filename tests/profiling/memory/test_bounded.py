"""What the bounded schedule promises about memory, counted by PyTorch's allocator."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import tiny_model

import kvpref
from kvpref import Batch, Group, LossOutput, ResponseLogps, Sequence
from kvpref.profiling.memory.peak import peak_bytes

CHUNK = 64
# Token ids, positions, indices and log-probs of a whole step are there at once: a few numbers per token, where the
# activations of a token are thousands even in this model.
PLAN_BYTES_PER_TOKEN = 128


def make_batch(num_prompt_tokens: int, num_responses: int) -> Batch:
    generator = random.Random(0)
    prompt = [generator.randrange(3, 101) for _ in range(num_prompt_tokens)]
    answers = [[3 + index, *(generator.randrange(3, 101) for _ in range(15))] for index in range(num_responses)]
    return kvpref.collate([Group([Sequence.from_prompt_and_response(prompt, answer) for answer in answers])])


def coupled(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
    return LossOutput(-torch.logsumexp(policy.mean(), dim=0), {})


def peak(num_prompt_tokens: int, num_responses: int, **options: object) -> int:
    """Above weights and gradients."""
    model = kvpref.attach(tiny_model("llama:tied", max_position_embeddings=8192))
    batch = make_batch(num_prompt_tokens, num_responses)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        kvpref.forward_backward(model, batch, coupled, **options)  # type: ignore[arg-type]

    run()
    held = sum(tensor.nbytes for tensor in model.parameters())
    return peak_bytes(run, torch.device("cpu"), resident_bytes=0) - held


def test_memory_does_not_grow_with_the_responses() -> None:
    bounded = {count: peak(128, count, schedule="bounded", max_tokens_per_chunk=CHUNK) for count in (8, 64)}
    full = {count: peak(128, count) for count in (8, 64)}
    assert bounded[64] - bounded[8] <= PLAN_BYTES_PER_TOKEN * 56 * 16
    assert full[64] - full[8] > 20 * PLAN_BYTES_PER_TOKEN * 56 * 16
    assert bounded[8] < full[8]


@pytest.mark.full
def test_only_keys_and_values_grow_with_the_prompt() -> None:
    short, long = (peak(length, 2, schedule="bounded", max_tokens_per_chunk=CHUNK) for length in (1024, 2048))
    config = tiny_model("llama:tied").config
    head_dim = config.hidden_size // config.num_attention_heads
    kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4 * 1024
    # Keys and values and their gradients, what one chunk's backward hands over of a layer, and a copy of it while it is
    # added up.
    per_layer = kv_bytes // config.num_hidden_layers
    assert 2 * kv_bytes <= long - short <= 2 * kv_bytes + 2 * per_layer + PLAN_BYTES_PER_TOKEN * 1024
    assert peak(2048, 2) - peak(1024, 2) > 10 * kv_bytes
