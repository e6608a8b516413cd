"""Options of a run: what does not exist or does not fit together is refused, with what would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sample_groups import pairs
from tiny_models import tiny_model, tiny_reward_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import kvpref
from kvpref import InputError, UnsupportedModelError
from kvpref.engine.options import DEFAULT_MAX_TOKENS_PER_CHUNK, EngineOptions
from kvpref.plan.modes import MODES

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"schedule": "lazy"}, "unknown schedule 'lazy'; choose from: full, bounded"),
    ({"mode": "three_pass"}, "unknown mode 'three_pass'; choose from: two_pass, one_pass, packed, padded"),
    ({"prefix_cache": "disk"}, "unknown prefix_cache 'disk'; choose from: device, cpu"),
    ({"checkpoint": "some"}, "unknown checkpoint 'some'; choose from: none, prefix, all"),
    ({"schedule": "bounded", "max_tokens_per_chunk": 0}, "max_tokens_per_chunk must be at least 1; got 0"),
    ({"max_tokens_per_chunk": 8}, "max_tokens_per_chunk goes with schedule 'bounded'; got schedule 'full'"),
    ({"gather_weights": "never"}, "unknown gather_weights 'never'; choose from: chunk, step"),
    ({"reduce_grads": "epoch"}, "unknown reduce_grads 'epoch'; choose from: chunk, step"),
    ({"gather_weights": "step"}, "gather_weights='step' goes with schedule 'bounded'; got schedule 'full'"),
    ({"prefix_cache": "cpu"}, "prefix_cache='cpu' goes with schedule 'bounded'; got schedule 'full'"),
    ({"prefix_cache": "cpu", "prefix_grad": False}, "prefix_cache='cpu' goes with schedule 'bounded'"),
    *(
        ({"mode": mode, **options}, f"goes with mode 'two_pass', which keeps prefixes apart; got mode '{mode}'")
        for mode in ("one_pass", "packed", "padded")
        for options in ({"schedule": "bounded"}, {"prefix_grad": False}, {"checkpoint": "prefix"})
    ),
    *(
        ({"mode": mode, "backend": "magic"}, "unknown attention backend 'magic'; choose from: auto, cpu_flash")
        for mode in MODES
    ),
    ({"mode": "padded", "backend": "reference"}, "'padded' runs the model's own attention"),
]
OF_FORWARDS = [(options, message) for options, message in WRONG if options.keys() <= {"mode", "backend", "checkpoint"}]


def weighted_sum(policy: kvpref.ResponseLogps, *_: Any) -> kvpref.LossOutput:
    return kvpref.LossOutput(policy.token_logps.sum(), {})


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(sorted(options)) for options, _ in WRONG])
def test_wrong_options_are_refused_before_anything_runs(options: dict[str, Any], message: str) -> None:
    def unreachable(*_: Any) -> kvpref.LossOutput:
        raise AssertionError("the loss was called")

    model = kvpref.attach(tiny_model("gpt2:plain"))
    with pytest.raises(InputError) as error:
        kvpref.forward_backward(model, kvpref.collate(pairs()), unreachable, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"), WRONG, ids=[" ".join(map(str, options.values())) for options, _ in WRONG]
)
def test_wrong_options_are_refused_where_they_are_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        EngineOptions(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(("options", "message"), OF_FORWARDS)
def test_forwards_without_options_refuse_the_same(options: dict[str, Any], message: str) -> None:
    model, reward_model = kvpref.attach(tiny_model("gpt2:plain")), kvpref.attach(tiny_reward_model("gpt2:plain"))
    batch = kvpref.collate(pairs())
    for forward, attached in ((kvpref.response_logps, model), (kvpref.response_rewards, reward_model)):
        with pytest.raises(InputError) as error:
            forward(attached, batch, **options)
        assert message in str(error.value)


def test_both_passes_refuse_unknown_backends() -> None:
    model, batch = kvpref.attach(tiny_model("gpt2:plain")), kvpref.collate(pairs())
    cache = kvpref.encode_prefix(model, batch)
    with pytest.raises(InputError, match="unknown attention backend 'magic'"):
        kvpref.encode_prefix(model, batch, backend="magic")
    with pytest.raises(InputError, match="unknown attention backend 'magic'"):
        kvpref.score_responses(model, batch, cache, backend="magic")


def test_the_bound_of_a_chunk() -> None:
    assert EngineOptions().chunk_tokens is None
    assert EngineOptions(prefix_grad=False).chunk_tokens is None
    assert EngineOptions(schedule="bounded").chunk_tokens == DEFAULT_MAX_TOKENS_PER_CHUNK == 8192
    assert EngineOptions(schedule="bounded", max_tokens_per_chunk=3).chunk_tokens == 3


def test_models_that_are_not_attached_are_refused() -> None:
    with pytest.raises(InputError, match=r"kvpref\.attach"):
        kvpref.forward_backward(tiny_model("llama"), kvpref.collate(pairs()), weighted_sum, schedule="bounded")


@pytest.mark.parametrize("schedule", ["full", "bounded"])
def test_dropout_and_reentrant_checkpointing_are_refused(schedule: str) -> None:
    batch = kvpref.collate(pairs())
    dropping = kvpref.attach(tiny_model("llama", attention_dropout=0.1))
    with pytest.raises(UnsupportedModelError, match="attention dropout"):
        kvpref.forward_backward(dropping, batch, weighted_sum, schedule=schedule)
    model = kvpref.attach(tiny_model("llama"))
    for layer in model.base_model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
    with pytest.raises(UnsupportedModelError, match="re-entrant"):
        kvpref.forward_backward(model, batch, weighted_sum, schedule=schedule)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("options", [{}, {"schedule": "bounded"}, {"prefix_grad": False}], ids=str)
def test_the_first_fsdp_is_refused(options: dict[str, Any], one_rank: None) -> None:
    """It gathers weights for one forward, and frees them after it."""
    model = FullyShardedDataParallel(kvpref.attach(tiny_model("llama")), device_id=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="use FSDP2"):
        kvpref.forward_backward(model, kvpref.collate(pairs()), weighted_sum, **options)


@pytest.mark.parametrize("options", [{}, {"schedule": "bounded", "max_tokens_per_chunk": 5}], ids=str)
def test_a_layer_that_is_sharded_alone_is_computed(options: dict[str, Any], one_rank: None) -> None:
    expected, model = kvpref.attach(tiny_model("llama")), kvpref.attach(tiny_model("llama"))
    kvpref.forward_backward(expected, kvpref.collate(pairs()), weighted_sum, **options)
    fully_shard(model.base_model.layers[0], mesh=init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    kvpref.forward_backward(model, kvpref.collate(pairs()), weighted_sum, **options)
    for found, own in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(found.grad.full_tensor(), own.grad)


def test_a_static_graph_is_refused(one_rank: None) -> None:
    """With it the second step's gradients would be averaged too early."""
    model = DistributedDataParallel(kvpref.attach(tiny_model("llama")), static_graph=True)
    with pytest.raises(UnsupportedModelError, match="leave static_graph out"):
        kvpref.forward_backward(model, kvpref.collate(pairs()), weighted_sum, schedule="bounded")
