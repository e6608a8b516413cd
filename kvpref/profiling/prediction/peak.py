"""The peak memory of one training step, predicted from a configuration alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn
from transformers import PreTrainedConfig

from kvpref.engine.options import EngineOptions
from kvpref.models.shape import model_shape
from kvpref.models.support import unwrap
from kvpref.profiling.prediction.depth import SHALLOW, extend, extend_bytes
from kvpref.profiling.prediction.model import (
    FakeTraining,
    TrainingSetup,
    build_fake_training,
    decoder_layers,
    layers_repeat,
)
from kvpref.profiling.prediction.ranks import ModelBytes, Ranks, resident_bytes
from kvpref.profiling.prediction.step import GroupShape, Moment, resting, trace_step
from kvpref.state.device_buffers import NUM_BUFFERS

_Key = tuple[EngineOptions, GroupShape, int]

_KEY_VALUES = ("prefix K/V", "prefix K/V gradients")


@dataclass(frozen=True, kw_only=True)
class PeakPrediction:
    """The moment of a step at which the most memory is held."""

    total_bytes: int
    """Bytes of all tensors and kernel buffers, on one device."""

    bytes_by_category: Mapping[str, int]
    """Bytes by category of `MemoryTracker`, and by those that `kvpref.profiling.prediction.ranks` adds."""

    region: str | None
    """The region of `kvpref.tracing` running at that moment."""

    resident_bytes: int
    """Bytes of weights, gradients and optimizer state, which stay from step to step."""


class Predictor:
    """Predicts peaks for one model, by running kvpref's own code on fake tensors.

    The step has several micro-batches that accumulate gradients, so gradients are held from its start. What reference
    log-probs and the optimizer's step need temporarily lies below the peak (fused AdamW takes nothing).

    What several ranks share follows a formula, see `kvpref.profiling.prediction.ranks`. If they share each micro-batch,
    what a step holds beyond weights, gradients and optimizer state is divided: rows by ranks, keys and values by heads.

    With the prefix cache on the CPU, keys and values of prefixes and their gradients count as the buffers that they
    pass through, which hold those of two layers.

    Args:
        config: The configuration of a supported family.
        setup: How it is trained.
        ranks: Devices that share the model.

    Raises:
        As `build_fake_training`.
    """

    def __init__(self, config: PreTrainedConfig, setup: TrainingSetup, *, ranks: Ranks | None = None) -> None:
        self.config, self.setup, self.ranks = config, setup, ranks or Ranks()
        self._deep: FakeTraining | None = None
        self._peaks: dict[_Key, PeakPrediction] = {}
        self._traced: dict[_Key, list[Moment]] = {}

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        num_layers: int = self.config.get_text_config(decoder=True).num_hidden_layers
        return num_layers

    @cached_property
    def _shallow(self) -> tuple[FakeTraining, FakeTraining] | None:
        """The model with few layers; None if layers differ, or are too few for it to pay."""
        shallow = build_fake_training(self.config, self.setup, min(SHALLOW, self.num_layers))
        if self.num_layers <= 2 * SHALLOW or not layers_repeat(self.config):
            return None
        return shallow, build_fake_training(self.config, self.setup, SHALLOW + 1)

    def build(self) -> None:
        """Build what all predictions need, which they do otherwise when they need it.

        Raises:
            As `build_fake_training`.
        """
        self._held  # noqa: B018 - computed now

    def peak(self, variant: EngineOptions, shape: GroupShape, num_groups: int = 1) -> PeakPrediction:
        """The peak of a micro-batch of `num_groups` groups; computed once."""
        key = (variant, shape, num_groups)
        if key not in self._peaks:
            self._peaks[key] = self._predict(*key)
        return self._peaks[key]

    def resident_bytes(self, variant: EngineOptions) -> int:
        """Bytes of weights, gradients and optimizer state, which stay from step to step."""
        return sum(self._resident(variant).values())

    def _resident(self, variant: EngineOptions) -> dict[str, int]:
        return resident_bytes(self._held, self.ranks, variant, self.model_bytes)

    @cached_property
    def _held(self) -> Mapping[str, int]:
        """What a single device would hold between steps, by category."""
        if self._shallow is None:
            return resting(self._whole())
        short, long = map(resting, self._shallow)
        return extend_bytes(short, long, self.num_layers)

    def _predict(self, variant: EngineOptions, shape: GroupShape, num_groups: int) -> PeakPrediction:
        key = (traced_as(variant), shape, num_groups)
        if key not in self._traced:
            self._traced[key] = self._moments(*key)
        moments = self._traced[key]
        held, resident = self._held, self._resident(variant)
        on_host = variant.prefix_cache == "cpu" and self.setup.device_type != "cpu"
        without_host = [_without_host(moment, self.num_layers) for moment in moments] if on_host else moments
        highest = max(without_host, key=lambda moment: moment.total_bytes)
        # Temporary memory, divided among ranks that share each micro-batch; the start of a step holds less of it.
        passing = {
            name: -(-(num_bytes - held.get(name, 0)) // self.ranks.sequence_parallel)
            for name, num_bytes in highest.bytes_by_category.items()
        }
        categories = {name: passing.get(name, 0) + resident.get(name, 0) for name in {**passing, **resident}}
        return PeakPrediction(
            total_bytes=sum(categories.values()),
            bytes_by_category={name: num_bytes for name, num_bytes in categories.items() if num_bytes},
            region=highest.region,
            resident_bytes=sum(resident.values()),
        )

    def _moments(self, variant: EngineOptions, shape: GroupShape, num_groups: int) -> list[Moment]:
        """Moments of the step, including the highest; the first one is before the step."""
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

    @cached_property
    def model_bytes(self) -> ModelBytes:
        """Its sizes in the dtype of passes."""
        model = (self._shallow[0] if self._shallow is not None else self._whole()).model
        layers = decoder_layers(model)
        inside = {parameter for layer in layers for parameter in layer.parameters()}
        outside = [parameter for parameter in model.parameters() if parameter not in inside]
        # Layers that are left out are like those that are present.
        times = self.num_layers / len(layers)
        largest = list(max(layers, key=lambda layer: self._num_bytes(layer.parameters())).parameters())
        trained = _trainable(inside)
        return ModelBytes(
            num_layers=self.num_layers,
            largest_layer=self._num_bytes(largest),
            largest_layer_grads=self._num_bytes(_trainable(largest)),
            outside=self._num_bytes(outside),
            outside_grads=self._num_bytes(_trainable(outside)),
            weights=round(times * self._num_bytes(inside)) + self._num_bytes(outside),
            grads=round(times * self._num_bytes(trained)) + self._num_bytes(_trainable(outside)),
            master=4 * (round(times * _num_elements(trained)) + _num_elements(_trainable(outside))),
        )

    @cached_property
    def heads_bytes(self) -> int:
        """Bytes of one token's query, key, value and attention output, over all layers."""
        model = (self._shallow[0] if self._shallow is not None else self._whole()).model
        kinds = model_shape(unwrap(model)).attention
        elements = sum(
            kind.kv_elements + kind.num_layers * kind.num_heads * (kind.head_dim + kind.value_dim) for kind in kinds
        )
        itemsize = (self.setup.mixed_precision or self.setup.dtype).itemsize
        return round(elements * itemsize * self.num_layers / len(decoder_layers(model)))

    def _num_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes in the dtype of passes; DDP keeps gradients in the weights' dtype."""
        dtype = None if self.ranks.shard == "ddp" else self.setup.mixed_precision
        return sum(item.numel() * (dtype or item.dtype).itemsize for item in parameters)


def traced_as(variant: EngineOptions) -> EngineOptions:
    """The options with which a variant is traced: what ranks gather and reduce when is a formula."""
    return replace(variant, gather_weights="chunk", reduce_grads="chunk")


def _without_host(moment: Moment, num_layers: int) -> Moment:
    """The moment with the prefix cache in host memory: only buffers for what a layer reads and adds to remain."""
    moved = {
        name: num_bytes - num_bytes * NUM_BUFFERS // num_layers
        for name in _KEY_VALUES
        if (num_bytes := moment.bytes_by_category.get(name, 0))
    }
    categories = {name: num_bytes - moved.get(name, 0) for name, num_bytes in moment.bytes_by_category.items()}
    return moment._replace(total_bytes=moment.total_bytes - sum(moved.values()), bytes_by_category=categories)


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def _num_elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
