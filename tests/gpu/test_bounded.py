"""The bounded schedule on a GPU: 16-bit gradients, no synchronisation, keys and values that wait in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from sample_groups import five_levels, pairs, tokens
from tiny_models import tiny_model

import kvpref
from kvpref import Group, Sequence
from kvpref.engine.options import EngineOptions
from kvpref.engine.schedules import forward_backward_step
from kvpref.plan.step import join_batches
from kvpref.state import transfers
from kvpref.state.device_buffers import NUM_BUFFERS
from kvpref.state.host_cache import HostPrefixes
from kvpref.state.lanes import Lane, lanes_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_LAYERS = 6
SLEEP_CYCLES = 4_000_000  # some 2 ms


def one_long_prompt() -> list[Group]:
    """Copies of its keys and values take longer than launching the next layer."""
    prompt = tokens(300, 1)
    return [Group([Sequence.from_prompt_and_response(prompt, [3 + i, *tokens(40, 2 + i)]) for i in range(8)])]


GROUPS = {"deep": five_levels() + pairs(), "long": one_long_prompt()}


def make_model(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    # Head dim 16: the kernel needs a multiple of 8.
    return tiny_model("mistral", dtype, num_hidden_layers=NUM_LAYERS).cuda()


def run(groups: list[Group], **options: Any) -> oracle.Result:
    batch = kvpref.collate(groups, min_shared_tokens=1, device="cuda")
    return oracle.scheduled(kvpref.attach(make_model()), batch, **options)


def assert_no_worse(found: oracle.Result, baseline: oracle.Result, exact: oracle.Result) -> None:
    """float64 judges both runs; a factor of 2 is far above the scatter of two roundings of the same sums."""
    assert oracle.relative_error(found.token_logps, exact.token_logps) <= 2 * oracle.relative_error(
        baseline.token_logps, exact.token_logps
    )
    for name, grad in exact.grads.items():
        if grad.ndim > 1:
            allowed = 2 * oracle.relative_error(baseline.grads[name], grad)
            assert oracle.relative_error(found.grads[name], grad) <= allowed, name


@pytest.mark.parametrize("checkpoint", ["none", "all"])
@pytest.mark.parametrize("prefix_cache", ["device", "cpu"])
@pytest.mark.parametrize("max_tokens", [64, None])
@pytest.mark.parametrize("name", GROUPS)
def test_bounded_is_no_worse_than_full(name: str, max_tokens: int | None, prefix_cache: str, checkpoint: str) -> None:
    exact = oracle.naive(make_model(torch.float64), GROUPS[name])
    options = {"max_tokens_per_chunk": max_tokens, "prefix_cache": prefix_cache, "checkpoint": checkpoint}
    found = run(GROUPS[name], schedule="bounded", **options)
    assert_no_worse(found, run(GROUPS[name]), exact)


@pytest.mark.parametrize("max_tokens", [64, None])
def test_copies_never_race(max_tokens: int | None) -> None:
    """The forward pass is the same bits wherever keys and values wait, time after time."""
    options: dict[str, Any] = {"schedule": "bounded", "max_tokens_per_chunk": max_tokens}
    expected = run(GROUPS["long"], **options).token_logps
    for _ in range(10):
        assert torch.equal(run(GROUPS["long"], prefix_cache="cpu", **options).token_logps, expected)


class SlowLane:
    """A lane that idles for some milliseconds before each copy."""

    def __init__(self, lane: Lane) -> None:
        self._lane, self.record, self.wait = lane, lane.record, lane.wait

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._lane.running():
            torch.cuda._sleep(SLEEP_CYCLES)
            yield


@pytest.mark.parametrize("checkpoint", ["none", "all"])
@pytest.mark.parametrize("max_tokens", [64, None])
@pytest.mark.parametrize("slow", ["up", "down", "compute"])
def test_a_slow_lane_changes_nothing(
    slow: str, max_tokens: int | None, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not wait for a copy reads another layer's numbers; what a copy does not wait for is overwritten."""
    options: dict[str, Any] = {"schedule": "bounded", "max_tokens_per_chunk": max_tokens, "checkpoint": checkpoint}
    expected = run(GROUPS["long"], **options)
    if slow == "compute":
        original = HostPrefixes.bring

        def bring(source: HostPrefixes, layer: int) -> Any:
            buffer = original(source, layer)  # the next layer's copies are begun
            torch.cuda._sleep(SLEEP_CYCLES)
            return buffer

        monkeypatch.setattr(HostPrefixes, "bring", bring)
    else:
        lanes = lanes_of(torch.device("cuda", torch.cuda.current_device()))
        slowed = lanes._replace(**{slow: SlowLane(getattr(lanes, slow))})
        monkeypatch.setattr(transfers, "lanes_of", lambda device: slowed)
    found = run(GROUPS["long"], prefix_cache="cpu", **options)
    assert torch.equal(found.token_logps, expected.token_logps)
    for name, grad in expected.grads.items():
        # Atomic additions in the kernels round differently from run to run; another layer's numbers are all wrong.
        assert oracle.relative_error(found.grads[name], grad) <= 2e-2, name


def test_host_memory_relieves_the_device() -> None:
    """A prompt's keys and values of all layers stay on the device, or those of a few."""
    model = kvpref.attach(make_model())
    batch = kvpref.collate(
        [Group([Sequence.from_prompt_and_response(tokens(6000, 1), [3 + i]) for i in range(2)])], device="cuda"
    )

    def peak_bytes(place: str) -> int:
        options = EngineOptions(schedule="bounded", max_tokens_per_chunk=64, prefix_cache=place)
        step = join_batches([batch], max_tokens_per_chunk=64)
        reserved = []
        for _ in range(4):  # the first one allocates gradients and workspaces
            torch.cuda.reset_peak_memory_stats()
            forward_backward_step(
                model,
                step,
                oracle.weighted_loss,
                options,
                references=[None],
                backward=lambda loss, _: loss.backward(),
            )
            torch.cuda.synchronize()
            reserved.append(torch.cuda.memory_reserved())
        assert reserved[-1] == reserved[-2]  # blocks do not pile up
        return torch.cuda.max_memory_allocated()

    config = model.config
    layer_bytes = 2 * config.num_key_value_heads * config.head_dim * 6000 * 2
    # Of K/V in bf16 and their gradients in fp32, buffers for two layers are left.
    saved = peak_bytes("device") - peak_bytes("cpu")
    assert saved > (3 * (NUM_LAYERS - NUM_BUFFERS) - 1) * layer_bytes


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("prefix_cache", ["device", "cpu"])
@pytest.mark.parametrize("max_tokens", [64, None])
def test_a_step_never_waits_for_the_device(max_tokens: int | None, prefix_cache: str, no_synchronisation: None) -> None:
    model = kvpref.attach(make_model())
    options = EngineOptions(schedule="bounded", max_tokens_per_chunk=max_tokens, prefix_cache=prefix_cache)
    batches = [kvpref.collate([group], min_shared_tokens=1) for group in GROUPS["deep"]]
    step = join_batches(batches, max_tokens_per_chunk=options.chunk_tokens).to("cuda")

    def once() -> None:
        forward_backward_step(
            model,
            step,
            lambda policy, *_: kvpref.LossOutput(policy.token_logps.square().sum(), {}),
            options,
            references=[None] * len(batches),
            backward=lambda loss, _: loss.backward(),
        )

    once()  # kernels load and Triton compiles on first use
    torch.cuda.set_sync_debug_mode("error")
    once()
