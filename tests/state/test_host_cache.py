"""Keys and values that wait in host memory; on the CPU, copies stand in for those of a device."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import oracle
import pytest
import torch
from lane_races import LaneRaces
from sample_groups import SCENARIOS, five_levels, pairs, tokens
from tiny_models import tiny_model
from torch import nn

import kvpref
from kvpref import Batch, Group, Sequence
from kvpref.engine import bounded
from kvpref.engine.options import EngineOptions
from kvpref.engine.schedules import score
from kvpref.models.checkpointing import CHECKPOINTS
from kvpref.plan.chunks import SlabSlice
from kvpref.prefix.slab_reads import SlabKey
from kvpref.state import transfers
from kvpref.state.device_buffers import NUM_BUFFERS, room
from kvpref.state.host_cache import HostPrefixes
from kvpref.state.host_slabs import HostRows, HostSlab
from kvpref.state.host_sums import HostSums
from kvpref.tracing import observe_marks

# The same numbers are read from another place.
FP64_TOLERANCE = 1e-10
NUM_LAYERS = 4


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the model were on a device with memory of its own."""
    monkeypatch.setattr(bounded, "moves_to_host", lambda device: True)


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch, moving: None) -> Iterator[LaneRaces]:
    gc.disable()  # memory of a device must not wait for the garbage collector
    yield watch(monkeypatch)
    gc.enable()


def watch(monkeypatch: pytest.MonkeyPatch, ignored: tuple[str, str] | None = None) -> LaneRaces:
    """What the lanes do from now on."""
    races = LaneRaces(ignored)
    monkeypatch.setattr(transfers, "lanes_of", lambda device: races.lanes)
    return races


def fills_of(monkeypatch: pytest.MonkeyPatch, owner: type[HostPrefixes] | type[HostSums]) -> list[int]:
    """The layers whose rows are copied to a buffer, in order."""
    layers: list[int] = []
    original = owner._fill

    def fill(self: Any, layer: int, memory: torch.Tensor) -> Any:
        layers.append(layer)
        return original(self, layer, memory)

    monkeypatch.setattr(owner, "_fill", fill)
    return layers


def attached(**overrides: Any) -> nn.Module:
    return kvpref.attach(tiny_model("llama", torch.float64, **overrides))


def one_prompt() -> Batch:
    responses = [[3 + i, *tokens(3, 20 + i)] for i in range(3)]
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
    layers = fills_of(monkeypatch, HostPrefixes)
    oracle.scheduled(attached(), kvpref.collate(pairs()), schedule="bounded", prefix_cache="cpu")
    assert not layers


def run_deep(batch: Batch, **options: Any) -> None:
    model = attached(num_hidden_layers=NUM_LAYERS)
    kvpref.forward_backward(model, batch, oracle.weighted_loss, schedule="bounded", prefix_cache="cpu", **options)


BATCHES = {"one prompt": one_prompt, "deep": lambda: kvpref.collate(five_levels() + pairs(), min_shared_tokens=1)}


RUNS = [(name, max_tokens, checkpoint) for name in BATCHES for max_tokens in (4, None) for checkpoint in CHECKPOINTS]
FEW = {("one prompt", 4, "none"), ("one prompt", None, "all"), ("deep", None, "prefix")}


@pytest.mark.parametrize(
    ("name", "max_tokens", "checkpoint"),
    [pytest.param(*run, marks=() if run in FEW else pytest.mark.full) for run in RUNS],
)
def test_copies_never_race(name: str, max_tokens: int | None, checkpoint: str, races: LaneRaces) -> None:
    """No buffer is filled before all that reads it has run, or read before it is filled; two of each kind are all."""
    with races:
        run_deep(BATCHES[name](), checkpoint=checkpoint, max_tokens_per_chunk=max_tokens)
    assert not races.races
    assert not races.blocking
    assert races.made == races.most == {"prefix K/V": NUM_BUFFERS, "prefix K/V gradients": NUM_BUFFERS}
    assert not races.alive.total()


# From down to compute the way is through up, unless the step breaks off; down needs nothing of up but through compute.
@pytest.mark.parametrize(
    "ignored", [("compute", "up"), ("up", "compute"), ("down", "compute"), ("up", "down")], ids="-".join
)
def test_every_wait_is_needed(ignored: tuple[str, str], monkeypatch: pytest.MonkeyPatch, moving: None) -> None:
    """A lane that does not wait for another one is a race that is found."""
    races = watch(monkeypatch, ignored)
    with races:
        run_deep(one_prompt(), max_tokens_per_chunk=4)
    assert races.races


@pytest.mark.parametrize("ignored", [None, ("compute", "down"), ("compute", "up")], ids=str)
def test_buffers_are_given_back_after_an_error(
    ignored: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch, moving: None
) -> None:
    """Compute, which gets their memory, waits for the copies that are on their way."""
    original, calls = HostSums.add, []

    def add(self: HostSums, *args: Any) -> None:
        calls.append(original(self, *args))
        if len(calls) == 3:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(HostSums, "add", add)
    races = watch(monkeypatch, ignored)
    with races, pytest.raises(torch.OutOfMemoryError):
        run_deep(one_prompt())
    assert races.made == {"prefix K/V": NUM_BUFFERS, "prefix K/V gradients": NUM_BUFFERS}
    assert not races.alive.total()
    assert bool(races.races) == (ignored is not None)


@pytest.mark.parametrize("checkpoint", ["none", "all"])
def test_graphs_do_not_wait_for_the_garbage_collector(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, races: LaneRaces
) -> None:
    """Neither the graph of a chunk nor what it reads is part of a cycle, not even what no backward pass went through.

    Of the prompt's first pieces, only keys and values of the last layer get a gradient.
    """
    alive: WeakSet[HostPrefixes] = WeakSet()
    original = HostPrefixes.__init__

    def init(self: HostPrefixes, *args: Any) -> None:
        original(self, *args)
        alive.add(self)

    monkeypatch.setattr(HostPrefixes, "__init__", init)
    most = []
    fills = HostSums._fill
    monkeypatch.setattr(HostSums, "_fill", lambda *args: (most.append(len(alive)), fills(*args))[1])
    run_deep(one_prompt(), max_tokens_per_chunk=4, checkpoint=checkpoint)
    assert max(most) == 1
    assert not alive


def test_without_gradients_there_are_no_sums(races: LaneRaces) -> None:
    with races:
        score(attached(), one_prompt(), EngineOptions(schedule="bounded", prefix_cache="cpu"))
    assert races.made == {"prefix K/V": NUM_BUFFERS}
    assert not races.races


def test_layers_are_brought_once_forward_and_once_backward(monkeypatch: pytest.MonkeyPatch, moving: None) -> None:
    """The responses' chunk keeps its graph: up through the layers, and down from the one below the two still there."""
    key_values, sums = fills_of(monkeypatch, HostPrefixes), fills_of(monkeypatch, HostSums)
    run_deep(one_prompt())
    upward = list(range(NUM_LAYERS))
    downward = upward[::-1]
    assert key_values == [*upward, *downward[2:]]
    # The responses add to sums; the prompt takes them up, each layer when it comes by.
    assert sums == [*downward, *downward]


@pytest.mark.parametrize("checkpoint", ["none", "all"])
def test_a_piece_takes_up_and_adds_at_once(checkpoint: str, monkeypatch: pytest.MonkeyPatch, moving: None) -> None:
    """A prompt of 12 tokens in 3 pieces, and 3 responses of 4: 6 chunks, all of which bring each layer's sums once."""
    sums = fills_of(monkeypatch, HostSums)
    run_deep(one_prompt(), max_tokens_per_chunk=4, checkpoint=checkpoint)
    assert sums == [*range(NUM_LAYERS)][::-1] * 6


def test_every_layer_is_begun_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, moving: None) -> None:
    """Forward and backward; copies that begin when they are waited for run beside nothing."""
    fills = fills_of(monkeypatch, HostPrefixes)
    original, late = HostPrefixes.bring, []

    def bring(self: HostPrefixes, layer: int) -> Any:
        begun = len(fills)
        buffer = original(self, layer)
        late.extend(number for number in fills[begun:] if number == layer)
        return buffer

    monkeypatch.setattr(HostPrefixes, "bring", bring)
    run_deep(one_prompt())
    assert len(fills) == 2 * NUM_LAYERS - 2
    assert not late


def test_buffers_hold_two_layers_of_the_slabs(moving: None) -> None:
    """As `kvpref plan` has it: of all layers' keys and values, and of their gradients, two layers' on the device."""
    num_bytes: Counter[tuple[str, bool]] = Counter()

    def add(kind: str, tensors: tuple[torch.Tensor, ...]) -> None:
        for tensor in tensors:
            num_bytes[kind, tensor.dtype == torch.uint8] += tensor.nbytes

    with observe_marks(add):
        run_deep(one_prompt())
    for kind in ("prefix K/V", "prefix K/V gradients"):
        on_device, on_host = num_bytes[kind, True], num_bytes[kind, False]
        share = on_host * NUM_BUFFERS // NUM_LAYERS
        assert share <= on_device <= share + NUM_BUFFERS * room(0, 5)


def made_up_rows(num_rows: int) -> tuple[HostRows, HostRows]:
    slabs = [HostSlab(num_rows, torch.empty(0, 2, 4)) for _ in range(2)]
    for slab in slabs:
        slab.data.normal_()
    return HostRows(slabs[0], 0, num_rows, False), HostRows(slabs[1], 0, num_rows, False)


def test_views_of_buffers_are_brought_again_and_other_tensors_kept(moving: None) -> None:
    place = SlabSlice(slab=SlabKey(0, 0, False), start=0, stop=6)
    reader: Any = SimpleNamespace(reads=[place], writes=None, num_tokens=1)
    layers = [made_up_rows(6) for _ in range(3)]
    source = HostPrefixes(transfers.Transfers(torch.device("cpu"), [reader]), layers, None)
    ((key, value),) = source.read(0)
    views = [key, value, key[2:4], value.flatten(1), key.transpose(0, 1), value.view(torch.int32)]
    expected = [view.clone() for view in views]
    packed = [source.pack(view) for view in views]
    for layer in (1, 2):  # other layers take the buffers
        source.read(layer)
    assert not torch.equal(views[0], expected[0])
    for note, view, wanted in zip(packed, views, expected, strict=True):
        assert note is not view
        assert torch.equal(source.unpack(note), wanted)
    other = key.clone()
    assert source.pack(other) is other
