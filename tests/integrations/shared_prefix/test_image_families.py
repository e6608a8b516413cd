"""Every family whose pixel inputs are taken apart, on the census's tiny models: a padded call inside and outside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import transformers
from packaging.version import Version
from padded_batches import switch_on
from transformers import CONFIG_MAPPING, PreTrainedModel

import kvpref
from kvpref.models.vision.splitting import SPLIT_FAMILIES

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
QUICK = ("idefics3", "llava_next", "mistral3", "qwen3_vl")
# Their outermost forward hands embeddings to what shared_prefix looks at.
UNSERVED = ("llama4",)
LATER = ("llama4", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "video_llava", "vipllava")


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def model_and_call(name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A row per response of the census's groups, padded on the left, each with its own copy of its images."""
    from census_image_inputs import joined
    from census_images import build_with_tower, case_with_images

    if name.partition(":")[0] not in CONFIG_MAPPING:
        pytest.skip("this release of transformers does not have it")
    if name in LATER and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this release of transformers hands its images on in another way, and such calls run unchanged")
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
        for key in call:
            value = torch.ones_like(ids) if key == "attention_mask" else own.get(key, ids)
            call[key][row, -len(ids) :] = value
        call["labels"][row, -len(ids) :] = torch.where(torch.tensor(sequence.scored), ids, -100)
    pixels = [{key: value for key, value in own.items() if key not in call} for own in case.inputs]
    return model, {**call, **joined([own for own in pixels if own], 0)}


def step(model: PreTrainedModel, call: dict[str, Any]) -> oracle.Result:
    """Logits of real tokens, and every gradient."""
    model.zero_grad(set_to_none=True)
    output = model(**call)
    output.loss.backward()
    return oracle.Result(output.logits[call["attention_mask"].bool()].detach(), oracle.grads_of(model))


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.full)
        for name in (*SPLIT_FAMILIES, "gemma4:both_ways", "llava:pixtral")
        if name not in UNSERVED
    ],
)
def test_a_padded_call(name: str) -> None:
    model, call = model_and_call(name)
    truth = step(model, call)
    with switch_on(model) as shared:
        found = step(model, call)
    assert shared.stats.num_served == 1, shared.stats
    # fp32, sums in another order; gradients that are zero but for rounding are compared with the largest.
    assert oracle.relative_error(found.token_logps, truth.token_logps) < 1e-4
    largest = max(float(grad.norm()) for grad in truth.grads.values())
    for key, grad in truth.grads.items():
        assert float((found.grads[key] - grad).norm()) < 1e-3 * float(grad.norm()) + 1e-5 * largest, key


@pytest.mark.parametrize("name", UNSERVED)
def test_a_call_that_runs_unchanged(name: str) -> None:
    model, call = model_and_call(name)
    with torch.no_grad(), switch_on(model) as shared:
        model(**call)
    assert dict(shared.stats.unserved) == {"inputs_embeds": 1}


def test_a_family_whose_prompts_see_both_ways_is_refused() -> None:
    from census_images import build_with_tower

    with pytest.raises(kvpref.UnsupportedModelError, match="all tokens of a prompt see one another"):
        switch_on(build_with_tower("paligemma"))
