"""Nothing is expanded per response: every byte of prefix keys and values that autograd holds, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sample_groups import tokens
from tiny_models import tiny_model
from torch import nn

import kvpref
from kvpref import Batch, Group, LossOutput, ResponseLogps, Sequence
from kvpref.tracing import observe_marks

NUM_PROMPT_TOKENS = 23
VARIANTS = ("llama", "gemma", "gpt2", "stablelm:parallel")
SCHEDULES: dict[str, dict[str, Any]] = {
    "full": {},
    "bounded": {"schedule": "bounded"},
    # Two pieces of the prompt, one response per chunk.
    "small chunks": {"schedule": "bounded", "max_tokens_per_chunk": 16},
    "constant prompts": {"prefix_grad": False},
}


def make_batch(num_responses: int) -> Batch:
    """One prompt; responses of 9 tokens, other ones than the prompt's: layer 0 gives equal tokens equal values."""
    prompt = [51 + token % 50 for token in tokens(NUM_PROMPT_TOKENS, 1)]
    responses = [[3 + i, *(3 + token % 48 for token in tokens(8, 40 + i))] for i in range(num_responses)]
    group = Group([Sequence.from_prompt_and_response(prompt, response) for response in responses])
    return kvpref.collate([group], min_shared_tokens=2)


def squares(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
    return LossOutput(policy.sum().square().mean(), {})


class Watch:
    """What autograd saves, and what the engine marks as prefix keys and values, while a step runs.

    Tensors are kept alive, so that no address is used twice.
    """

    def __init__(self) -> None:
        self.saved: list[torch.Tensor] = []
        self.marked: list[torch.Tensor] = []

    def run(self, model: nn.Module, batch: Batch, **options: Any) -> Watch:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor), observe_marks(self._mark):
            kvpref.forward_backward(model, batch, squares, **options)
        return self

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.saved.append(tensor.detach())
        return tensor

    def _mark(self, kind: str, tensors: tuple[torch.Tensor, ...]) -> None:
        if kind == "prefix K/V":
            self.marked.extend(tensor.detach() for tensor in tensors)

    def storages(self) -> dict[int, int]:
        """Address -> bytes of every storage marked as prefix keys or values."""
        return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.marked}

    def copies(self) -> list[torch.Tensor]:
        """Saved tensors in other storages that hold some token's prefix keys or values of one head in full.

        A copy in any layout, expanded over heads or responses or cut into pieces, holds such a row somewhere. The
        first token does not count: it attends to itself alone, so the attention's output is its value.
        """
        rows = {row.numpy().tobytes() for tensor in self.marked for row in tensor[1:].flatten(0, -2)}
        head_dim = self.marked[0].shape[-1]
        held = self.storages()
        return [
            tensor
            for tensor in self.saved
            if tensor.untyped_storage().data_ptr() not in held
            and tensor.ndim > 1
            and tensor.shape[-1] == head_dim
            and tensor.dtype == self.marked[0].dtype
            and any(row.contiguous().numpy().tobytes() in rows for row in tensor.flatten(0, -2))
        ]


def expected_bytes(model: nn.Module) -> int:
    """2 x layers x kv_heads x head_dim x unique prefix tokens x itemsize."""
    config = model.config
    num_kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * num_kv_heads * head_dim * NUM_PROMPT_TOKENS * model.dtype.itemsize


@pytest.mark.parametrize("num_responses", [2, 16])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefix_keys_and_values_stand_once(variant: str, schedule: str, num_responses: int) -> None:
    model = kvpref.attach(tiny_model(variant))
    watch = Watch().run(model, make_batch(num_responses), **SCHEDULES[schedule])
    storages = watch.storages()
    assert len(storages) == 2 * model.config.num_hidden_layers
    assert sum(storages.values()) == expected_bytes(model)
    assert any(tensor.untyped_storage().data_ptr() in storages for tensor in watch.saved), "autograd reads the slabs"


@pytest.mark.parametrize("num_responses", [2, 16])
@pytest.mark.parametrize("schedule", ["full", "constant prompts"])
@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_autograd_holds_no_copy(variant: str, schedule: str, num_responses: int) -> None:
    model = kvpref.attach(tiny_model(variant))
    assert not Watch().run(model, make_batch(num_responses), **SCHEDULES[schedule]).copies()


@pytest.mark.parametrize("num_responses", [2, 16])
def test_in_bounded_only_the_prompts_own_pass_holds_a_second_copy(num_responses: int) -> None:
    """Its keys and values are copied to the slab; its graph, while it lasts, holds those that its layers made."""
    model = kvpref.attach(tiny_model("llama"))
    copies = Watch().run(model, make_batch(num_responses), schedule="bounded").copies()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in copies}
    assert sum(storages.values()) == expected_bytes(model)


def test_the_watch_sees_copies() -> None:
    """It would find keys that were expanded over two responses, or cast and cast back."""
    watch = Watch().run(kvpref.attach(tiny_model("llama")), make_batch(2))
    key = watch.marked[0]
    before = len(watch.copies())
    watch.saved += [key.repeat(2, 1, 1), key[3:5].clone(), key.clone().transpose(0, 1)]
    assert len(watch.copies()) == before + 3
