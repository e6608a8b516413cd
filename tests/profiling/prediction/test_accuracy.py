"""Predicted peaks against those that PyTorch's allocator counts for the same step on real tensors, on the CPU."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, PreTrainedConfig

import kvpref
from kvpref.engine.options import EngineOptions
from kvpref.losses import LossOutput
from kvpref.plan.step import join_batches
from kvpref.profiling.memory.peak import peak_bytes
from kvpref.profiling.prediction.model import OPTIMIZERS, TrainingSetup
from kvpref.profiling.prediction.peak import Predictor
from kvpref.profiling.prediction.step import GroupShape
from kvpref.records.tensor_fields import map_tensors

SHAPE = GroupShape(prompt_tokens=160, response_tokens=48, num_responses=6)
NUM_GROUPS = 2
# Of what a step holds on top of weights, gradients and optimizer state. The prediction knows no buffers of matrix
# products and no scalars; what its CPU kernels hide it knows by formulas.
TOLERANCE = 0.01

VARIANTS = {
    "full": EngineOptions(),
    "packed": EngineOptions(mode="packed"),
    "padded": EngineOptions(mode="padded"),
    "bounded": EngineOptions(schedule="bounded", max_tokens_per_chunk=128),
    "checkpointed": EngineOptions(checkpoint="all"),
}


def config_of(family: str) -> PreTrainedConfig:
    """Wide enough for activations to outweigh the weights."""
    if family == "gpt2":
        return tiny_config("gpt2", n_embd=96, n_head=6, vocab_size=499)
    sizes = {"hidden_size": 96, "intermediate_size": 160, "vocab_size": 499, "num_hidden_layers": 3}
    return tiny_config(family, **sizes)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param(family, variant, marks=() if family == "llama" else pytest.mark.full)
        for family in ("llama", "gemma", "gpt2")
        for variant in VARIANTS
    ],
)
def test_predicted_peak_is_the_measured_one(family: str, variant: str) -> None:
    config, options = config_of(family), VARIANTS[variant]
    setup = TrainingSetup(dtype=torch.float32, device_type="cpu")
    predicted = Predictor(config, setup).peak(options, SHAPE, NUM_GROUPS)
    measured = measured_peak(config, options)
    resident = predicted.resident_bytes
    assert measured > 1.5 * resident  # or the weights would hide a wrong prediction
    assert predicted.total_bytes - resident == pytest.approx(measured - resident, rel=TOLERANCE)


def measured_peak(config: PreTrainedConfig, variant: EngineOptions) -> int:
    """Of a step that adds to gradients, with AdamW's state."""
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = kvpref.attach(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).train()
    batch = SHAPE.batch(NUM_GROUPS, ragged=variant.mode == "padded")
    parameters = list(model.parameters())
    state = sum(tensor.nbytes for parameter in parameters for tensor in OPTIMIZERS["adamw"](parameter))
    held = sum(tensor.nbytes for tensor in (*parameters, *model.buffers()))

    def step() -> None:
        kvpref.forward_backward(model, batch, lambda policy, *_: LossOutput(policy.sum().mean(), {}), **asdict(variant))

    return peak_bytes(step, torch.device("cpu"), held + state + index_bytes(batch, variant))


def index_bytes(batch: kvpref.Batch, variant: EngineOptions) -> int:
    """Of the plan's tensors, whose memory is numpy's, so that PyTorch's allocator does not report it."""
    plan = (
        join_batches([batch], max_tokens_per_chunk=variant.chunk_tokens).chunks
        if variant.schedule == "bounded"
        else batch.plan(variant.mode)
    )
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    map_tensors(plan, note)
    return sum(storages.values())
