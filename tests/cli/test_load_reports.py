"""transformers' table of weights that did not fit is shown, unless it only names the new head of a reward model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from transformers import LlamaForCausalLM

from kvpref import InputError
from kvpref.cli.loading import load_model


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What transformers logs, which it does not hand on to pytest."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    LlamaForCausalLM(tiny_config("llama", tie_word_embeddings=request.param)).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **weights: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | weights, path, metadata={"format": "pt"})


def test_a_new_head_is_no_news(folder: Path, logged: list[str]) -> None:
    load_model(str(folder), None, reads="ends", may_add_head=True)
    assert logged == []


def test_nor_is_that_of_an_adapter(folder: Path, logged: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")
    model = load_model(str(folder), None, reads="ends", may_add_head=True)
    adapter = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    peft.get_peft_model(model, adapter).save_pretrained(tmp_path / "adapter")
    load_model(str(tmp_path / "adapter"), None, reads="ends")
    assert logged == []


def test_a_language_model_that_lacks_weights_is_shown_and_refused(folder: Path, logged: list[str]) -> None:
    path = folder / "model.safetensors"
    left = {name: weight for name, weight in load_file(path).items() if name != "model.norm.weight"}
    save_file(left, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"the weights lack 'model\.norm\.weight'"):
        load_model(str(folder), None)
    assert "LOAD REPORT" in logged[0]


def test_a_weight_that_is_left_over_is_shown(folder: Path, logged: list[str]) -> None:
    change(folder, surplus=torch.zeros(1))
    load_model(str(folder), None, reads="ends", may_add_head=True)
    (table,) = logged
    assert "LOAD REPORT" in table
    assert "surplus" in table


def test_a_weight_of_another_shape_is_shown(folder: Path, logged: list[str]) -> None:
    change(folder, **{"model.norm.weight": torch.zeros(3)})
    with pytest.raises(InputError, match="cannot load the model"):
        load_model(str(folder), None, reads="ends", may_add_head=True)
    (table,) = logged
    assert "model.norm.weight" in table
