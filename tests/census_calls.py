"""The census's tiny models with images, and calls of them on padded rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, PreTrainedModel

from kvpref.models.vision.splitting import SPLIT_FAMILIES

# Earlier releases of transformers hand their images on in another way.
_LATER = ("llama4", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "video_llava", "vipllava")
_QUICK = ("idefics3", "llava_next", "mistral3", "qwen3_vl")


def split_families(*, but: tuple[str, ...] = ()) -> list[Any]:
    """Those whose pixel inputs are taken apart, as parameters: all in `make test-all`, a few otherwise."""
    names = [name for name in (*SPLIT_FAMILIES, "gemma4:both_ways", "llava:pixtral") if name not in but]
    return [name if name in _QUICK else pytest.param(name, marks=pytest.mark.full) for name in names]


def model_and_call(name: str, *, side: str = "left") -> tuple[PreTrainedModel, dict[str, Any]]:
    """A row per response of the census's groups, padded on one side, each with its own copy of its images.

    `benchmarks` has to be on the path.
    """
    from census_image_inputs import joined
    from census_images import build_with_tower, case_with_images

    if name.partition(":")[0] not in CONFIG_MAPPING:
        pytest.skip("this release of transformers does not have it")
    if name in _LATER and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this release of transformers hands its images on in another way")
    model = build_with_tower(name)
    case = case_with_images(name, model)
    rows = [sequence for group in case.groups for sequence in group.sequences]
    width = max(map(len, rows))
    call = {
        key: torch.zeros(len(rows), width, dtype=torch.int64)
        for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
        if key in case.inputs[0] or key in ("input_ids", "attention_mask")
    }
    call["labels"] = torch.full_like(call["input_ids"], -100)
    for row, (sequence, own) in enumerate(zip(rows, case.inputs, strict=True)):
        ids = torch.tensor(sequence.input_ids)
        place = slice(width - len(ids), width) if side == "left" else slice(len(ids))
        for key in call:
            value = torch.ones_like(ids) if key == "attention_mask" else own.get(key, ids)
            call[key][row, place] = value
        call["labels"][row, place] = torch.where(torch.tensor(sequence.scored), ids, -100)
    pixels = [{key: value for key, value in own.items() if key not in call} for own in case.inputs]
    return model, {**call, **joined([own for own in pixels if own], 0)}
