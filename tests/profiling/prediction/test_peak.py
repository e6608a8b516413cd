"""Predicted peaks: what they are made of."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch._subclasses import FakeTensorMode

from kvpref.engine.options import EngineOptions
from kvpref.errors import InputError
from kvpref.ops.attention import AttentionParams, CascadePlan, VarlenBlock, cascade_attention, splitting
from kvpref.ops.attention.backends import efficient
from kvpref.prefix.blocks import VarlenLayout
from kvpref.profiling.prediction.kernels import running_on
from kvpref.profiling.prediction.model import OPTIMIZERS, TrainingSetup
from kvpref.profiling.prediction.peak import Predictor
from kvpref.profiling.prediction.ranks import GATHERED, MASTER, Ranks
from kvpref.profiling.prediction.step import GroupShape

SHAPE = GroupShape(prompt_tokens=64, response_tokens=32, num_responses=4)
REAL_OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "sgd_momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_that_of_torch(name: str) -> None:
    model = tiny_model("llama")
    parameters = list(model.parameters())
    optimizer = REAL_OPTIMIZERS[name](parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value is not None]
    predicted = [tensor for parameter in parameters for tensor in OPTIMIZERS[name](parameter)]
    assert sum(tensor.nbytes for tensor in predicted) == sum(tensor.nbytes for tensor in states)


def test_resident_bytes_are_weights_gradients_and_two_moments() -> None:
    config = tiny_config("llama")
    model = tiny_model("llama", dtype=torch.bfloat16)
    peak = Predictor(config, TrainingSetup()).peak(EngineOptions(), SHAPE)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert peak.bytes_by_category["gradients"] == weights
    assert peak.bytes_by_category["optimizer"] == 2 * weights + 4 * len(list(model.parameters()))
    assert sum(peak.bytes_by_category.values()) == peak.total_bytes > peak.resident_bytes


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("variant", "layers", "outsides"),
    [
        (EngineOptions(), None, 2),
        (EngineOptions(mode="packed"), 3, 2),
        (EngineOptions(schedule="bounded"), 3, 2),
        (EngineOptions(schedule="bounded", gather_weights="step", reduce_grads="step"), None, 2),
    ],
)
def test_fsdp2_divides_what_is_resident_and_adds_what_is_gathered(
    variant: EngineOptions, layers: int | None, outsides: int
) -> None:
    config = tiny_config("llama")
    one, four = (
        Predictor(config, TrainingSetup(), ranks=Ranks(world_size=size)).peak(variant, SHAPE) for size in (1, 4)
    )
    for name in ("parameters", "gradients", "optimizer"):
        assert four.bytes_by_category[name] == -(-one.bytes_by_category[name] // 4)
    model = tiny_model("llama", dtype=torch.bfloat16)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    outside = sum(parameter.nbytes for parameter in model.parameters()) - layer * len(model.model.layers)
    # Two layers and the gradients of one, or all layers with all their gradients.
    layers = 2 * len(model.model.layers) if layers is None else layers
    assert four.bytes_by_category[GATHERED] == layers * layer + outsides * outside
    # Activations are not sharded.
    assert four.total_bytes - four.resident_bytes == one.total_bytes - one.resident_bytes


def test_ranks_that_share_micro_batches_divide_activations() -> None:
    config = tiny_config("llama")
    one, two = (
        Predictor(config, TrainingSetup(), ranks=Ranks(world_size=4, shard="ddp", sequence_parallel=number)).peak(
            EngineOptions(), SHAPE
        )
        for number in (1, 2)
    )
    assert two.resident_bytes == one.resident_bytes
    passing = one.total_bytes - one.resident_bytes
    assert passing / 2 <= two.total_bytes - two.resident_bytes <= passing / 2 + len(one.bytes_by_category)


@pytest.mark.parametrize("shard", ["zero1", "zero2", "zero3"])
def test_deepspeed_trains_float32_weights_and_runs_those_of_the_passes(shard: str) -> None:
    setup = TrainingSetup(dtype=torch.float32, mixed_precision=torch.bfloat16)
    peak = Predictor(tiny_config("llama"), setup, ranks=Ranks(world_size=4, shard=shard)).peak(EngineOptions(), SHAPE)
    num_weights = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    assert peak.bytes_by_category["parameters"] == peak.bytes_by_category["gradients"] == 2 * num_weights
    assert peak.bytes_by_category[MASTER] == num_weights
    assert peak.bytes_by_category["optimizer"] == pytest.approx(2 * num_weights, rel=0.01)


@pytest.mark.full
def test_a_prefix_cache_on_the_cpu_keeps_two_layers_on_the_device() -> None:
    config = tiny_config("llama", num_hidden_layers=12)
    shape = GroupShape(prompt_tokens=256, response_tokens=32, num_responses=4)
    predictor = Predictor(config, TrainingSetup())
    on_device, on_host = (
        predictor.peak(EngineOptions(schedule="bounded", max_tokens_per_chunk=64, prefix_cache=place), shape)
        for place in ("device", "cpu")
    )
    kept = on_device.bytes_by_category["prefix K/V"]
    assert kept == 12 * 2 * 256 * 2 * 12 * 2  # layers, K and V, tokens, heads, head dim, bytes
    assert on_host.bytes_by_category["prefix K/V"] == kept // 6
    assert on_host.total_bytes < on_device.total_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
        ({"lora_r": 0}, "at least 1; got 0"),
        ({"device_type": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_unknown_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingSetup(**settings)  # type: ignore[arg-type]


def test_attention_adapters_are_fewer_than_all() -> None:
    pytest.importorskip("peft")
    config = tiny_config("gpt2")  # its projections of attention and MLP share a name
    counts = {}
    attention = "attn.c_attn,attn.c_proj"
    for targets in (attention, "all-linear"):
        setup = TrainingSetup(lora_r=2, lora_target_modules=targets)
        counts[targets] = Predictor(config, setup).peak(EngineOptions(), SHAPE).bytes_by_category["gradients"]
    # fp32 adapters of rank 2: per layer c_attn (32 -> 96) and c_proj (32 -> 32).
    assert counts[attention] == 3 * 2 * 4 * ((32 + 96) + (32 + 32))
    assert counts["all-linear"] > counts[attention]
    with pytest.raises(InputError, match="no module 'mlp_in'; its linear layers: c_attn, c_fc, c_proj, lm_head"):
        Predictor(config, TrainingSetup(lora_r=2, lora_target_modules="mlp_in")).peak(EngineOptions(), SHAPE)


def test_float32_weights_without_autocast_are_predicted_for_cuda() -> None:
    # Attention takes another kernel there than in 16 bits.
    config = tiny_config("llama")
    narrow, wide = (
        Predictor(config, TrainingSetup(dtype=dtype)).peak(EngineOptions(), SHAPE)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert wide.resident_bytes > 1.9 * narrow.resident_bytes
    assert wide.total_bytes > wide.resident_bytes


def test_the_workspace_of_the_memory_efficient_backward_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows with pairs x longest; the layers of a step take it one after another."""
    asked: list[tuple[int, ...]] = []

    def workspace_bytes(*sizes: int) -> int:
        asked.append(sizes)
        return 10**9

    config, setup = tiny_config("llama"), TrainingSetup(dtype=torch.float32)
    without = Predictor(config, setup).peak(EngineOptions(), SHAPE).total_bytes
    monkeypatch.setattr(efficient, "workspace_bytes", workspace_bytes)
    with_it = Predictor(config, setup).peak(EngineOptions(), SHAPE).total_bytes
    assert 10**9 < with_it < 10**9 + without
    heads, head_dim = config.num_attention_heads, config.head_dim
    # Prompt over itself; responses over themselves and the prompt, whose queries are those of all responses.
    assert {(1, heads, 64, head_dim), (4, heads, 32, head_dim), (1, heads, 128, head_dim)} <= set(asked)


def test_a_block_that_is_split_takes_less_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """One response of 300 tokens among 400 of 2: padded to the longest, all together would take 200 times as much."""
    lengths = [300, *[2] * 400]
    offsets = torch.tensor([0, *lengths]).cumsum(0).tolist()
    block = VarlenBlock.from_layout(VarlenLayout(cu_seqlens_q=offsets, cu_seqlens_k=offsets, shape="causal"))
    monkeypatch.setattr(splitting, "MAX_WASTED_BYTES", 2**20)
    asked: list[int] = []

    def workspace_bytes(num_pairs: int, num_heads: int, longest: int, head_dim: int) -> int:
        asked.append(num_pairs * longest)
        return 8 * num_pairs * num_heads * longest * head_dim

    monkeypatch.setattr(efficient, "workspace_bytes", workspace_bytes)
    with FakeTensorMode(allow_non_fake_inputs=True), running_on("cuda", lambda operator: None):
        tensors = [torch.empty(offsets[-1], 8, 64).requires_grad_() for _ in range(3)]
        plan = CascadePlan(blocks=(block,), params=AttentionParams(scale=1.0))
        cascade_attention(*tensors, [], plan).sum().backward()
    assert sum(asked[-2:]) == 300 + 400 * 2
