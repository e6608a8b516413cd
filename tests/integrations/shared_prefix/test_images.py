"""Padded rows with images: each encoded once, and all else as the unchanged model gives it, towers included."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from padded_batches import switch_on
from vision_calls import padded_call
from vision_families import FAMILIES
from vision_models import VisionPrompt, picture, tiny_vision_model

import kvpref
from kvpref.models.backbone import backbone
from kvpref.models.vision.splitting import SPLIT_FAMILIES

KNOWN = sorted(set(FAMILIES) & set(SPLIT_FAMILIES))
# Only the order of additions differs. Towers round their positions to fp32, the same for an image alone or not.
FP64_TOLERANCE = 1e-9


def floats_as(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def step(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    with oracle.precision(model):
        output = model(**inputs)
        (output.loss + output.logits[inputs["attention_mask"].bool()].square().mean()).backward()
    return output, without_key_biases(oracle.grads_of(model))


@contextmanager
def counted_pixels(model: Any) -> Iterator[list[int]]:
    """The number of values that the model's tower is given, call by call."""
    base, seen = backbone(model), []
    own = base.get_image_features

    @functools.wraps(own)
    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(inspect.signature(own).bind(*args, **kwargs).arguments["pixel_values"].numel())
        return own(*args, **kwargs)

    base.get_image_features = counting
    yield seen
    del base.get_image_features


def without_key_biases(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Softmax does not see a bias of keys, so its gradient is zero but for rounding."""
    biases = [name for name in grads if name.endswith("k_proj.bias") and "vision" in name]
    assert all(grads.pop(name).norm() < 1e-10 for name in biases)
    return grads


def assert_served(model: Any, inputs: dict[str, Any]) -> kvpref.integrations.shared_prefix.SharedPrefix:
    before, grads_before = step(model, inputs)
    with counted_pixels(model) as seen, switch_on(model) as switch:
        after, grads = step(model, inputs)
    assert switch.stats.num_served == 1, switch.stats
    assert switch.stats.num_unique_tokens < 0.8 * switch.stats.num_tokens
    assert sum(seen) < 0.6 * inputs["pixel_values"].numel()
    real = inputs["attention_mask"].bool()
    assert oracle.relative_error(after.loss, before.loss) < FP64_TOLERANCE
    found, truth = after.logits[real], before.logits[real]
    oracle.assert_same(oracle.Result(found, grads), oracle.Result(truth, grads_before), FP64_TOLERANCE)
    towers = [name for name in grads if "language_model" not in name and "lm_head" not in name]
    assert any(bool(grads[name].any()) for name in towers)
    return switch


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", KNOWN)
def test_logits_loss_and_every_gradient(name: str, side: str) -> None:
    """One image, none, two of different sizes, and one image under two questions, in one batch."""
    inputs = floats_as(padded_call(name, side), torch.float64)
    assert_served(tiny_vision_model(name, torch.float64), inputs)
