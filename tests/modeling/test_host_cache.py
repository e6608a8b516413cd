"""Keys and values that wait in host memory; on the CPU, copies stand in for those of a device."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from sample_groups import SCENARIOS, pairs, tokens
from tiny_models import tiny_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import kvpref
from kvpref import Batch, Group, LossOutput, ResponseLogps, Sequence
from kvpref.modeling import bounded
from kvpref.modeling.checkpointing import CHECKPOINTS
from kvpref.modeling.host_cache import HostPrefixes

# The same numbers are read from another place.
FP64_TOLERANCE = 1e-10
NUM_LAYERS = 5


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the model were on a device with memory of its own."""
    monkeypatch.setattr(bounded, "moves_to_host", lambda device: True)


class Copies:
    """Every storage that was brought from the host, by layer; weakly, to see which are still there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[int, StorageWeakRef]] = []
        self.most_layers = 0
        original = HostPrefixes._copy

        def copy(source: HostPrefixes, layer: int) -> Any:
            copies = original(source, layer)
            self.made += [(layer, StorageWeakRef(tensor.untyped_storage())) for tensor in copies.tensors]
            self.most_layers = max(self.most_layers, len(self.layers()))
            return copies

        monkeypatch.setattr(HostPrefixes, "_copy", copy)

    def layers(self) -> set[int]:
        """Layers of which a copy is still alive."""
        return {layer for layer, storage in self.made if not storage.expired()}


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch, moving: None) -> Iterator[Copies]:
    gc.disable()  # memory of a device must not wait for the garbage collector
    yield Copies(monkeypatch)
    gc.enable()


def attached(**overrides: Any) -> nn.Module:
    return kvpref.attach(tiny_model("llama", torch.float64, **overrides))


def one_prompt() -> Batch:
    responses = [[3 + i, *tokens(3, 20 + i)] for i in range(6)]
    group = Group([Sequence.from_prompt_and_response(tokens(12, 1), response) for response in responses])
    return kvpref.collate([group], min_shared_tokens=1)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("max_tokens", [4, None])
@pytest.mark.parametrize("scenario", ["pairs", "five_levels", "different_scoring"])
def test_same_gradients(scenario: str, max_tokens: int | None, checkpoint: str, moving: None) -> None:
    groups = SCENARIOS[scenario]()
    truth = oracle.naive(tiny_model("llama", torch.float64), groups)
    batch = kvpref.collate(groups, min_shared_tokens=1)
    options = {"max_tokens_per_chunk": max_tokens, "checkpoint": checkpoint, "prefix_cache": "cpu"}
    oracle.assert_same(oracle.scheduled(attached(), batch, schedule="bounded", **options), truth, FP64_TOLERANCE)


def test_constant_prompts(moving: None) -> None:
    batch = kvpref.collate(pairs(), min_shared_tokens=1)
    runs = [
        oracle.scheduled(attached(), batch, schedule="bounded", prefix_grad=False, prefix_cache=place)
        for place in ("cpu", "device")
    ]
    oracle.assert_same(*runs, FP64_TOLERANCE)


def test_autocast(moving: None) -> None:
    batch = kvpref.collate(pairs(), min_shared_tokens=1)
    model = kvpref.attach(tiny_model("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        runs = [oracle.scheduled(model, batch, schedule="bounded", prefix_cache=place) for place in ("cpu", "device")]
    for name, grad in runs[1].grads.items():
        assert torch.equal(runs[0].grads[name], grad), name


def test_on_a_cpu_model_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Copies(monkeypatch)
    oracle.scheduled(attached(), kvpref.collate(pairs()), schedule="bounded", prefix_cache="cpu")
    assert not seen.made


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("max_tokens", [12, None])
def test_the_graph_keeps_no_copy(max_tokens: int | None, checkpoint: str, copies: Copies) -> None:
    """Between forward and backward the last layer's are left; while layers run, at most those of two."""
    alive: list[set[int]] = []

    def loss(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        alive.append(copies.layers())
        return LossOutput(policy.sum().sum(), {})

    kvpref.forward_backward(
        attached(num_hidden_layers=NUM_LAYERS),
        one_prompt(),
        loss,
        schedule="bounded",
        prefix_cache="cpu",
        checkpoint=checkpoint,
        max_tokens_per_chunk=max_tokens,
    )
    assert {layer for layer, _ in copies.made} == set(range(NUM_LAYERS))
    assert alive[0] <= {NUM_LAYERS - 1}
    assert copies.most_layers <= 2
    assert not copies.layers()


def test_layers_are_brought_once_forward_and_once_backward(copies: Copies) -> None:
    """The responses' chunk keeps its graph: up through the layers, and down."""
    oracle.scheduled(attached(num_hidden_layers=NUM_LAYERS), one_prompt(), schedule="bounded", prefix_cache="cpu")
    upward = list(range(NUM_LAYERS))
    assert [layer for layer, _ in copies.made[::2]] == [*upward, *reversed(upward)]


def test_another_tensor_is_not_taken_for_a_copy(moving: None) -> None:
    """Same shape and values in other memory, and the same memory in another shape, are saved as they are."""
    leaf = torch.randn(6, 2, 4)
    source = HostPrefixes([((leaf, leaf + 1),)], torch.device("cpu"))
    ((key, value),) = source.read(0)
    assert source.pack(key) is not key
    assert torch.equal(source.unpack(source.pack(value)), leaf + 1)
    for other in (key.clone(), key[:3], key.flatten(1)):
        assert source.pack(other) is other
