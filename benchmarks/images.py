"""Forward and backward of a vision-language model: one image and a short question, 2 and 8 short responses.

Compared with `packed`, which repeats prompts and runs the tower once per response, as ordinary training does, and with
`padded`. `bounded` keeps no graph of prompts and images, so it runs them twice; its ideal is that of `two_pass`, and no
bar is held against it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from forward_backward import mean_nll
from options import SweepOptions
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

import kvpref
from kvpref import Group, Image, PlacedImage, Sequence
from kvpref.engine.options import EngineOptions
from kvpref.errors import RunError
from kvpref.profiling.compare.comparison import Comparison, compare
from kvpref.profiling.compare.modes import find_differences, step_case
from kvpref.profiling.steps import StepOutcome, TrainStep, make_micro_batches

TITLE = "forward + backward of a model with a vision tower"
BAR = 0.88
_PATCH, _MERGE = 14, 2
_START, _END, _IMAGE = 1, 2, 3
"""Token ids around an image, and of its placeholders."""

VARIANTS: Mapping[str, EngineOptions] = {
    "two_pass": EngineOptions(),
    "bounded": EngineOptions(schedule="bounded", max_tokens_per_chunk=1024),
    "packed": EngineOptions(mode="packed"),
    "padded": EngineOptions(mode="padded"),
}
"""Case -> how it runs."""


@dataclass(frozen=True, kw_only=True)
class ImageShape:
    """One prompt with an image."""

    rows: int = 20
    """Of the image's tokens."""

    columns: int = 30
    """Of the image's tokens."""

    question: int = 40
    """Tokens of text after it."""

    response: int = 24
    """Tokens of each response."""

    responses: int = 2
    """Number of responses."""

    layers: int = 6
    """Layers of the language model."""

    tower_layers: int = 12
    """Layers of the tower."""

    hidden: int = 256
    """Elements of a hidden state of the language model."""

    tower_hidden: int = 128
    """Elements of a hidden state of the tower, in which a token of the image has four patches."""


def rows(options: SweepOptions) -> dict[str, Callable[[], Comparison]]:
    """Name -> what measures that row."""
    size = {"layers": 4, "hidden": 4096, "tower_hidden": 1280} if options.gpu_rows else {}
    shapes = [ImageShape(responses=count, **size) for count in (2, 8)]
    if options.quick:
        shapes = shapes[:1]
    return {
        f"{shape.rows * shape.columns} image tokens/{shape.responses} against {baseline}": partial(
            _measure, f"{shape.rows * shape.columns} image tokens/{shape.responses} against {baseline}",
            _tiny(shape) if options.dry_run else shape, baseline, options,
        )
        for shape in shapes
        for baseline in ("packed", "padded")
    }  # fmt: skip


def _tiny(shape: ImageShape) -> ImageShape:
    return replace(
        shape, rows=4, columns=5, question=4, response=2, responses=2, layers=2, tower_layers=2, hidden=64,
        tower_hidden=32,
    )  # fmt: skip


def _measure(name: str, shape: ImageShape, baseline: str, options: SweepOptions) -> Comparison:
    """Check that all cases compute the same, and time them.

    Raises:
        RunError: If they do not; nothing is timed then.
    """
    model = build_model(shape, options)
    cut = [[make_group(shape)]]
    steps = {
        case: TrainStep(
            model,
            mean_nll,
            make_micro_batches(model, cut, mean_nll, mode=VARIANTS[case].mode, device=options.device),
            VARIANTS[case].mode,
            options=VARIANTS[case],
        )
        for case in ("two_pass", "bounded", baseline)
    }
    outcomes = {case: step.check() for case, step in steps.items()}
    tolerance = StepOutcome(1e-4, 1e-4) if options.dtype == torch.float32 else StepOutcome(2e-2, 2e-2)
    different = find_differences(outcomes, tolerance, baseline)
    if different:
        raise RunError("; ".join(f"{case}: {how}" for case, how in different.items()))
    cases = [replace(step_case(step), name=case) for case, step in steps.items()]
    flops = {case: step.flops() for case, step in steps.items()}
    return Comparison(
        name=name,
        baseline=baseline,
        results=compare(
            cases, baseline=baseline, device=options.device, options=options.timing, with_memory=options.with_memory
        ),
        facts={
            **vars(shape),
            **{f"tower share of FLOPs {case}": count.vision / count.total for case, count in flops.items()},
            **{f"loss {case}": outcome.loss for case, outcome in outcomes.items()},
        },
        bar=None if options.dry_run else BAR,
        held=("two_pass",),
    )


def make_group(shape: ImageShape) -> Group:
    """Random tokens after an image; responses differ from their first token on."""
    generator = random.Random(0)
    count = shape.rows * shape.columns
    image = Image(
        key="made up", token_id=_IMAGE, num_tokens=count, read=partial(make_pixels, shape.rows, shape.columns)
    )
    question = generator.choices(range(10, 1000), k=shape.question)
    prompt = [_START, *[_IMAGE] * count, _END, *question]
    scored = (False,) * len(prompt) + (True,) * shape.response
    firsts = generator.sample(range(10, 1000), k=shape.responses)
    responses = [[first, *generator.choices(range(10, 1000), k=shape.response - 1)] for first in firsts]
    placed = (PlacedImage(image, ((1, 1 + count),)),)
    return Group([Sequence((*prompt, *response), scored, images=placed) for response in responses])


def make_pixels(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Inputs as from Qwen2.5-VL's processor for an image of this size in tokens: flattened patches, and its grid."""
    height, width = rows * _MERGE, columns * _MERGE
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(height * width, 3 * 2 * _PATCH * _PATCH, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}


def build_model(shape: ImageShape, options: SweepOptions) -> PreTrainedModel:
    """A Qwen2.5-VL with random weights, attached, in training mode."""
    heads = max(2, shape.hidden // 64)
    head_dim = shape.hidden // heads
    text: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": 4 * shape.hidden * 2 // 3 // 64 * 64 or 64,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [head_dim // 8, head_dim * 3 // 16, head_dim // 2 - head_dim // 8 - head_dim * 3 // 16],
        },
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    tower: dict[str, Any] = {
        "depth": shape.tower_layers,
        "hidden_size": shape.tower_hidden,
        "intermediate_size": shape.tower_hidden * 8 // 3 // 32 * 32 or 32,
        "num_heads": max(2, shape.tower_hidden // 64),
        "out_hidden_size": shape.hidden,
        "patch_size": _PATCH,
        "spatial_merge_size": _MERGE,
        "window_size": 112,
        "fullatt_block_indexes": [index for index in range(shape.tower_layers) if index % 4 == 3],
    }
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config=text,
        vision_config=tower,
        image_token_id=_IMAGE,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForImageTextToText.from_config(config, dtype=options.dtype)
    return kvpref.attach(model).train()
