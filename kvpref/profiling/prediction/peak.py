"""The peak memory of one training step, predicted from a configuration alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from transformers import PreTrainedConfig

from kvpref.engine.options import EngineOptions
from kvpref.errors import InputError
from kvpref.profiling.memory.tracker import GRADIENTS, OPTIMIZER, PARAMETERS
from kvpref.profiling.prediction.depth import SHALLOW, extend
from kvpref.profiling.prediction.model import (
    FakeTraining,
    TrainingSetup,
    build_fake_training,
    decoder_layers,
    layers_repeat,
)
from kvpref.profiling.prediction.step import GroupShape, Moment, trace_step
from kvpref.state.device_buffers import NUM_BUFFERS

GATHERED = "gathered by sharding"
_KEY_VALUES = ("prefix K/V", "prefix K/V gradients")


@dataclass(frozen=True, kw_only=True)
class PeakPrediction:
    """The moment of a step at which most is held."""

    total_bytes: int
    """Of all tensors and kernel buffers, on one device."""

    bytes_by_category: Mapping[str, int]
    """Category of `MemoryTracker` -> bytes; `GATHERED` with sharding."""

    region: str | None
    """The region of `kvpref.tracing` that runs then."""

    resident_bytes: int
    """Of weights, gradients and optimizer state, which stay from step to step."""


class Predictor:
    """Predicts peaks for one model, by running kvpref's own code on fake tensors.

    The step is one of several micro-batches that add up their gradients: gradients are held from its start. What a
    micro-batch's reference log-probs and the optimizer's step need for a moment lies below its peak (AdamW in its
    fused form takes nothing).

    Sharding (FSDP2, ZeRO 3) is a formula: weights, gradients and optimizer state are divided by the shards; gathered
    at once are two decoder layers (one computes, the next one arrives), the gradients of one, and all that is outside
    the decoder layers (embeddings, LM head) with its gradients.

    With the prefix cache on the CPU, keys and values of prefixes and their gradients count for the buffers that they
    pass through, which hold those of two layers.

    Args:
        config: Of a supported family.
        setup: How it is trained.
        num_shards: Devices that share weights, gradients and optimizer state.

    Raises:
        InputError: If `num_shards` is not positive. As `build_fake_training` otherwise.
    """

    def __init__(self, config: PreTrainedConfig, setup: TrainingSetup, *, num_shards: int = 1) -> None:
        if num_shards < 1:
            raise InputError(f"the number of shards must be at least 1; got {num_shards}")
        self.config, self.setup, self.num_shards = config, setup, num_shards
        self._deep: FakeTraining | None = None
        self._peaks: dict[tuple[EngineOptions, GroupShape, int], PeakPrediction] = {}

    @property
    def num_layers(self) -> int:
        """Of the model."""
        num_layers: int = self.config.get_text_config(decoder=True).num_hidden_layers
        return num_layers

    @cached_property
    def _shallow(self) -> tuple[FakeTraining, FakeTraining] | None:
        """The model with few layers; None where layers differ, or are too few for it to be worth while."""
        shallow = build_fake_training(self.config, self.setup, min(SHALLOW, self.num_layers))
        if self.num_layers <= 2 * SHALLOW or not layers_repeat(self.config):
            return None
        return shallow, build_fake_training(self.config, self.setup, SHALLOW + 1)

    def peak(self, variant: EngineOptions, shape: GroupShape, num_groups: int = 1) -> PeakPrediction:
        """The peak of a micro-batch of `num_groups` groups; computed once."""
        key = (variant, shape, num_groups)
        if key not in self._peaks:
            self._peaks[key] = self._predict(*key)
        return self._peaks[key]

    def _predict(self, variant: EngineOptions, shape: GroupShape, num_groups: int) -> PeakPrediction:
        moments = self._moments(variant, shape, num_groups)
        resident = self._resident(moments[0])
        on_host = variant.prefix_cache == "cpu" and self.setup.device_type != "cpu"
        held = [_without_host(moment, self.num_layers) for moment in moments] if on_host else moments
        highest = max(held, key=lambda moment: moment.total_bytes)
        change = {name: resident[name] - moments[0].bytes_by_category.get(name, 0) for name in resident}
        categories = {
            name: highest.bytes_by_category.get(name, 0) + change.get(name, 0)
            for name in {**highest.bytes_by_category, **change}
        }
        return PeakPrediction(
            total_bytes=highest.total_bytes + sum(change.values()),
            bytes_by_category={name: num_bytes for name, num_bytes in categories.items() if num_bytes},
            region=highest.region,
            resident_bytes=sum(resident.values()),
        )

    def _moments(self, variant: EngineOptions, shape: GroupShape, num_groups: int) -> list[Moment]:
        """Moments of the step, the highest among them; the first one is before it."""
        batch = shape.batch(num_groups, ragged=variant.mode == "padded")
        moments: list[Moment] | None = None
        if self._shallow is not None:
            short, long = (trace_step(training, batch, variant, self.setup.device_type) for training in self._shallow)
            moments = extend(short, long, self.num_layers)
        return moments or trace_step(self._whole(), batch, variant, self.setup.device_type)

    def _whole(self) -> FakeTraining:
        if self._deep is None:
            self._deep = build_fake_training(self.config, self.setup)
        return self._deep

    def _resident(self, start: Moment) -> dict[str, int]:
        """What stays from step to step, by category."""
        held = {name: start.bytes_by_category.get(name, 0) for name in (PARAMETERS, GRADIENTS, OPTIMIZER)}
        if self.num_shards == 1:
            return held
        sharded = {name: -(-num_bytes // self.num_shards) for name, num_bytes in held.items()}
        return {**sharded, GATHERED: self._gathered_bytes()}

    def _gathered_bytes(self) -> int:
        model = (self._shallow[0] if self._shallow is not None else self._whole()).model
        layers = decoder_layers(model)
        inside = {parameter for layer in layers for parameter in layer.parameters()}
        outside = [parameter for parameter in model.parameters() if parameter not in inside]
        layer = max(layers, key=lambda layer: _num_bytes(layer.parameters()))
        return (
            2 * _num_bytes(layer.parameters())
            + _num_bytes(_trainable(layer.parameters()))
            + _num_bytes(outside)
            + _num_bytes(_trainable(outside))
        )


def _without_host(moment: Moment, num_layers: int) -> Moment:
    """With the prefix cache in host memory: buffers for what a layer reads, and for what it adds to, remain."""
    moved = {
        name: num_bytes - num_bytes * NUM_BUFFERS // num_layers
        for name in _KEY_VALUES
        if (num_bytes := moment.bytes_by_category.get(name, 0))
    }
    categories = {name: num_bytes - moved.get(name, 0) for name, num_bytes in moment.bytes_by_category.items()}
    return moment._replace(total_bytes=moment.total_bytes - sum(moved.values()), bytes_by_category=categories)


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def _num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)
