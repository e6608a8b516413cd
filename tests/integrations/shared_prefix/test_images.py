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


@pytest.mark.parametrize("name", KNOWN)
def test_checkpointed_towers_and_layers(name: str) -> None:
    model = tiny_vision_model(name, torch.float64)
    oracle.checkpoint_layers(model)
    assert_served(model, floats_as(padded_call(name), torch.float64))


def test_an_attached_model() -> None:
    model = kvpref.attach(tiny_vision_model("qwen2_5_vl", torch.float64))
    assert_served(model, floats_as(padded_call("qwen2_5_vl"), torch.float64))


def test_equal_text_with_other_pixels_shares_no_image() -> None:
    """The plan that is kept is not that of the pixels before, and each call runs its own."""
    model, tokens_run = tiny_vision_model("gemma3", torch.float64).eval(), []
    switch = switch_on(model)
    for second in (1, 2, 1):
        asked = [VisionPrompt("Which colour has it?", (picture(seed),), ("Red", "Blue")) for seed in (1, second)]
        inputs = floats_as(padded_call("gemma3", prompts=asked), torch.float64)
        with torch.no_grad(), oracle.true_float64():
            before = switch.stats.num_unique_tokens
            found = model(**inputs).logits
            truth = oracle.twin(model)(**inputs).logits
        real = inputs["attention_mask"].bool()
        assert oracle.relative_error(found[real], truth[real]) < FP64_TOLERANCE
        tokens_run.append(switch.stats.num_unique_tokens - before)
    assert tokens_run[0] == tokens_run[2] < tokens_run[1]


def unserved(name: str, inputs: dict[str, Any]) -> str:
    """Why a call runs unchanged; it gives the same bits, or the same error."""
    model = tiny_vision_model(name).eval()

    def run() -> torch.Tensor | str:
        with torch.no_grad():
            try:
                return model(**inputs).logits
            except (ValueError, RuntimeError) as error:
                return str(error)

    before = run()
    with switch_on(model) as switch:
        after = run()
    assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
    assert switch.stats.num_served == 0
    (reason,) = switch.stats.unserved
    return reason


def test_what_is_not_known_of_images_runs_unchanged() -> None:
    qwen, gemma = padded_call("qwen2_5_vl"), padded_call("gemma3")
    mismatch = "images that are not those of the placeholders"
    assert unserved("qwen2_5_vl", {**qwen, "image_grid_thw": qwen["image_grid_thw"][:-1]}) == mismatch
    assert unserved("gemma3", {**gemma, "pixel_values": gemma["pixel_values"][:-1]}) == mismatch
    assert unserved("gemma3", {**gemma, "token_type_ids": torch.zeros_like(gemma["token_type_ids"])}) == mismatch
    assert unserved("gemma3", {name: value for name, value in gemma.items() if name != "token_type_ids"}) == mismatch
    without = {name: value for name, value in gemma.items() if name != "pixel_values"}
    assert unserved("gemma3", without) == mismatch  # its placeholders still see one another both ways
    places = torch.arange(qwen["input_ids"].shape[1]).expand(3, *qwen["input_ids"].shape)
    assert unserved("qwen2_5_vl", {**qwen, "position_ids": places}) == "position_ids that are not (rows, columns)"
    assert unserved("qwen2_5_vl", {**qwen, "position_ids": places[0]}) == "position_ids beside images"
    assert unserved("qwen2_5_vl", {**qwen, "second_per_grid_ts": torch.ones(3)}) == "second_per_grid_ts"


def test_text_alone_is_served_as_before() -> None:
    asked = [VisionPrompt("What is the capital of France?", (), ("Paris", "Lyon, or so"))]
    inputs = floats_as(padded_call("qwen2_5_vl", prompts=asked), torch.float64)
    model = tiny_vision_model("qwen2_5_vl", torch.float64)
    before, _ = step(model, inputs)
    with switch_on(model) as switch:
        after, _ = step(model, inputs)
    assert switch.stats.num_served == 1
    real = inputs["attention_mask"].bool()
    assert oracle.relative_error(after.logits[real], before.logits[real]) < FP64_TOLERANCE
