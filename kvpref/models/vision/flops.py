"""FLOPs of a model's vision tower and projector, by PyTorch's counter on one run of each image shape.

Towers differ too much for formulas: windows, tiles, poolings. So one image of every shape runs forward and, if any
weight of the tower or projector trains, backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import flop_counter

from kvpref.models.support import unwrap
from kvpref.models.vision.tower import image_features
from kvpref.plan.batch import ImageInputs
from kvpref.records.images import Image

_MOST_VALUES = 64
"""Largest integer input whose values count as deciding the work (the sides of a grid); larger ones count by shape."""

_ATEN = torch.ops.aten


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs for tensors of shape (B, H, M, D)."""
    return int(flop_counter.sdpa_flop_count(query, key, value))


def _attention_backward_flops(dout: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs for tensors of shape (B, H, M, D)."""
    return int(flop_counter.sdpa_backward_flop_count(dout, query, key, value))


_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""CPU kernels that the counter does not know."""


class VisionFlops:
    """Counts FLOPs of images, each shape once.

    Args:
        model: A model with a tower; it runs in its current state, on its device, and is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        self._known: dict[Any, int] = {}

    def of(self, images: Sequence[Image], inputs: Mapping[str, ImageInputs]) -> int:
        """FLOPs of running the tower on each image, forward, and backward if it trains.

        Args:
            images: The images that run; one that runs twice counts twice.
            inputs: The tower's inputs by image key.
        """
        return sum(self._of_one(image, inputs[image.key]) for image in images)

    def _of_one(self, image: Image, inputs: ImageInputs) -> int:
        trains = tuple(parameter.requires_grad for parameter in self._model.parameters())
        key = (trains, tuple(sorted((name, _signature(value)) for name, value in inputs.items())))
        if key not in self._known:
            self._known[key] = self._count(image, inputs)
        return self._known[key]

    def _count(self, image: Image, inputs: ImageInputs) -> int:
        weights = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        counter = flop_counter.FlopCounterMode(display=False, custom_mapping=_ATTENTION)
        with torch.random.fork_rng(devices), torch.enable_grad(), counter:
            made = image_features(self._model, [image], {image.key: inputs})
            ends = [tensor for tensor in (made.features, *made.deepstack) if tensor.requires_grad]
            if ends:
                # Not `backward`, which would change the weights' gradients.
                torch.autograd.grad(ends, weights, [torch.ones_like(end) for end in ends], allow_unused=True)
        return counter.get_total_flops()


def _signature(value: Any) -> str:
    """What distinguishes inputs for which a tower computes different amounts."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    decides = not value.is_floating_point() and value.numel() <= _MOST_VALUES
    return f"{tuple(value.shape)} {value.dtype} {value.tolist() if decides else ''}"
