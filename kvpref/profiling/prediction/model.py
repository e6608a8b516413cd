"""Models without memory: a configuration built on fake tensors, as it would be trained.

Fake tensors have shapes, dtypes and storages with sizes, but no data. They are on the CPU, whatever device they stand
in for, because autograd runs only on devices that the installed PyTorch supports.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kvpref.errors import InputError
from kvpref.models.attach import attach
from kvpref.models.backbone import text_backbone
from kvpref.models.classes import model_class
from kvpref.models.lora_targets import ALL_LINEAR, find_targets
from kvpref.models.support import check_config, unwrap

DEVICES = ("cuda", "cpu")

Parameters = list[nn.Parameter]


def _moments(count: int, has_step: bool) -> Callable[[nn.Parameter], list[torch.Tensor]]:
    def state(parameter: nn.Parameter) -> list[torch.Tensor]:
        step = [torch.empty((), dtype=torch.float32)] if has_step else []
        return [torch.empty_like(parameter, requires_grad=False) for _ in range(count)] + step

    return state


OPTIMIZERS: dict[str, Callable[[nn.Parameter], list[torch.Tensor]]] = {
    "adamw": _moments(2, has_step=True),
    "sgd": _moments(0, has_step=False),
    "sgd_momentum": _moments(1, has_step=False),
}
"""The state that each of torch.optim's optimizers keeps for a parameter, in the parameter's dtype."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """How a model is to be trained.

    Raises:
        InputError: If a choice is unknown or out of range.
    """

    dtype: torch.dtype = torch.bfloat16

    mixed_precision: torch.dtype | None = None
    """Autocast to this dtype in forward passes; None for none."""

    optimizer: str = "adamw"
    """One of `OPTIMIZERS`."""

    lora_r: int | None = None
    """Train only LoRA adapters of this rank; None trains all parameters."""

    lora_target_modules: str = ALL_LINEAR
    """Linear layers with adapters: all but the LM head, or names separated by commas."""

    device_type: str = "cuda"
    """The type of device that training will use; one of `DEVICES`."""

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("optimizer", self.optimizer, tuple(OPTIMIZERS)),
            ("device", self.device_type, DEVICES),
        ):
            if value not in valid:
                raise InputError(f"unknown {name} {value!r}; choose from: {', '.join(valid)}")
        if self.lora_r is not None and self.lora_r < 1:
            raise InputError(f"the LoRA rank must be at least 1; got {self.lora_r}")


@dataclass(frozen=True, kw_only=True)
class FakeTraining:
    """A fake model and what must live as long as it."""

    mode: FakeTensorMode
    """The mode under which its tensors were made and steps run."""

    model: nn.Module
    """Attached, in training mode; every trainable parameter has a gradient, as after an earlier micro-batch."""

    optimizer_state: tuple[torch.Tensor, ...]


def build_fake_training(config: PreTrainedConfig, setup: TrainingSetup, num_layers: int | None = None) -> FakeTraining:
    """Build a model on fake tensors.

    Args:
        config: The configuration of a supported family.
        setup: How it is trained. Dropout is assumed off, since kvpref refuses it.
        num_layers: Build only this many of its layers.

    Raises:
        UnsupportedModelError: If kvpref does not support the model.
        InputError: If there is no causal language model of this type, or LoRA is asked for without PEFT.
    """
    check_config(config)
    # PEFT moves modules between devices, which meta tensors can do and fake ones cannot.
    with torch.device("meta"):
        model = attach(_from_config(with_num_layers(config, num_layers), setup.dtype))
        trained: nn.Module = model if setup.lora_r is None else _with_lora(model, setup)
    trained.train()
    _switch_dropout_off(trained)
    # Index tensors of the plans are real: the engine reads some of them.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _replace_tensors(trained)
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        state = tuple(tensor for parameter in parameters for tensor in OPTIMIZERS[setup.optimizer](parameter))
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter, requires_grad=False)
    if setup.mixed_precision is not None:
        inner = unwrap(trained)
        # As accelerate wraps it.
        inner.forward = torch.autocast("cpu", dtype=setup.mixed_precision)(inner.forward)
    return FakeTraining(mode=mode, model=trained, optimizer_state=state)


def with_num_layers(config: PreTrainedConfig, num_layers: int | None) -> PreTrainedConfig:
    """A copy of a configuration that has only its first layers; None keeps all."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config(decoder=True)
    before = text.num_hidden_layers
    if num_layers is None or num_layers == before:
        return changed
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:num_layers])  # one entry per layer, such as layer_types
    text.num_hidden_layers = num_layers
    return changed


def layers_repeat(config: PreTrainedConfig) -> bool:
    """Whether all decoder layers are identical: the same modules, sizes and settings."""
    with torch.device("meta"):
        model = _from_config(copy.deepcopy(config), torch.float32)
    layers = decoder_layers(model)
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    return len(layers) == num_layers and len({_fingerprint(layer) for layer in layers}) == 1


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The decoder layers of a model, in order; not those of its vision tower."""
    layers = text_backbone(unwrap(model)).modules()
    return [module for module in layers if isinstance(module, GradientCheckpointingLayer)]


def _from_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model: PreTrainedModel = model_class(config).from_config(config, dtype=dtype)
    except ValueError as error:
        raise InputError(f"{config.model_type!r} has no causal language model: {error}") from error
    return model


def _fingerprint(layer: nn.Module) -> tuple[Any, ...]:
    """A layer's composition, apart from its number."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        settings = sorted(
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and not key.startswith("_") and key != "layer_idx"
        )
        parts.append((name, type(module), tuple(settings)))
    parts.extend((name, tensor.shape) for name, tensor in (*layer.named_parameters(), *layer.named_buffers()))
    return tuple(parts)


def _replace_tensors(model: nn.Module) -> None:
    """Put a tensor on the CPU in place of every parameter and buffer on the meta device; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is not None and id(old) not in made:
                    new = torch.empty_like(old, device="cpu", requires_grad=False)
                    is_parameter = isinstance(old, nn.Parameter)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
                if old is not None:
                    held[name] = made[id(old)]  # type: ignore[assignment]


def _switch_dropout_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - a plain number on most attention modules


def _with_lora(model: PreTrainedModel, setup: TrainingSetup) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError('predicting LoRA needs PEFT: pip install "kvpref[peft]"') from error
    targets = find_targets(model, setup.lora_target_modules)
    assert setup.lora_r is not None
    lora = LoraConfig(r=setup.lora_r, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    adapted: nn.Module = get_peft_model(model, lora)
    return adapted
