"""The census of models that are given images, on a few that differ in tower, positions and masks; on all by `full`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as ENTRIES

from kvpref.models.families import REFUSED
from kvpref.models.vision.families import VISION, WITHOUT_IMAGES

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
QUICK = ("idefics3", "mllama", "paligemma", "qwen3_vl")
REST = [name for name in VISION if name not in QUICK and name in ENTRIES]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in REST)])
def test_exact(name: str) -> None:
    from census_images import check_images

    row = check_images(name, ("two_pass", "bounded", "padded"))
    assert row["verdict"] == "exact", row


@pytest.mark.parametrize("name", ["mllama", "qwen2_vl"])
def test_a_batch_of_one_image(name: str) -> None:
    import census_check
    import census_images

    made = census_images.subject(name)
    one = made._replace(groups=made.groups[:1], logps=lambda model: made.logps(model)[:9])
    row = census_check.check(name, ("two_pass",), subject=lambda name: one)
    assert row["verdict"] == "exact", row


@pytest.mark.parametrize("name", ["mllama", "idefics3"])
def test_a_models_own_inputs_are_told_of_a_sequence(name: str) -> None:
    import census_images

    from kvpref.models.vision.own_inputs import own_inputs

    model = census_images.build_with_tower(name)
    case = census_images.case_with_images(name, model)
    sequences = [sequence for group in case.groups for sequence in group.sequences]
    for sequence, inputs in zip(sequences, case.inputs, strict=True):
        told = model(**own_inputs(model, sequence)).logits
        assert torch.equal(told, model(**inputs).logits)


def test_every_entry_is_exact_or_refused_by_name() -> None:
    unknown = [name for name in ENTRIES if not {name} & {*VISION, *WITHOUT_IMAGES, *REFUSED}]
    assert not unknown


@pytest.mark.parametrize("name", [name for name in WITHOUT_IMAGES if name not in ("gemma3n",)])
def test_given_text_only(name: str) -> None:
    from census_images import check_images

    row = check_images(name, ("two_pass",))
    assert row["verdict"] == "refused", row
    assert WITHOUT_IMAGES[name] in row["reason"]


def test_what_is_wrong_is_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of an image in the place of another's."""
    import census_images

    from kvpref.engine import mode_program

    def turned(*args: Any) -> Any:
        made = image_features(*args)
        return made._replace(features=torch.roll(made.features, 1, dims=0))

    image_features = mode_program.image_features
    monkeypatch.setattr(mode_program, "image_features", turned)
    row = census_images.check_images("llava", ("two_pass",))
    assert row["verdict"] == "wrong"


def test_keys_and_values_of_images_exist_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mllama's layers attend to the same tensors in every pass, however many responses there are."""
    import census_images

    import kvpref
    from kvpref.models.vision import cross_attention

    model = census_images.build_with_tower("mllama")
    groups = census_images.case_with_images("mllama", model).groups
    real, seen = cross_attention.cascade_attention, []

    def spy(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        seen.append((key, value))
        return real(query, key, value, *rest)

    monkeypatch.setattr(cross_attention, "cascade_attention", spy)
    kvpref.response_logps(kvpref.attach(model), kvpref.collate(groups))
    num_layers = len(model.config.text_config.cross_attention_layers)
    assert len(seen) == 2 * num_layers  # prompts, then responses
    assert len({id(key) for key, _ in seen}) == num_layers
    assert len({id(value) for _, value in seen}) == num_layers
