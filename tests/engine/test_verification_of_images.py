"""Comparing a model at hand with its own forward, images included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line_in_process import run
from vision_families import build_vision_processor
from vision_models import tiny_vision_model, vision_groups

from kvpref.engine.verification import compare_with_naive
from kvpref.models.vision import tower


@pytest.mark.parametrize("mode", ["two_pass", "padded"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_prompts_with_images_are_compared(name: str, mode: str) -> None:
    errors = compare_with_naive(tiny_vision_model(name), mode=mode, groups=vision_groups(name).groups)
    assert errors.within_tolerance
    assert errors.max_logp_error > 0


def test_features_in_another_order_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tower._rows
    monkeypatch.setattr(tower, "_rows", lambda made: rows(made).flip(0))
    errors = compare_with_naive(tiny_vision_model("qwen2_5_vl"), groups=vision_groups("qwen2_5_vl").groups)
    assert errors.max_logp_error > 1e-3
    assert not errors.within_tolerance


def test_models_that_see_images_are_compared_on_text_where_no_groups_are_given() -> None:
    assert compare_with_naive(tiny_vision_model("gemma3")).within_tolerance


def test_the_command_compares_on_pictures_where_a_processor_is_beside_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_vision_model("qwen2_5_vl").save_pretrained(tmp_path)
    run("check", tmp_path, "--numeric", "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pictures"] is False
    build_vision_processor("qwen2_5_vl").save_pretrained(tmp_path)
    run("check", tmp_path, "--numeric", "--json")
    captured = capsys.readouterr().out
    found = json.loads(captured.splitlines()[-1])
    assert found["pictures"] is True
    assert "pictures included" in " ".join(captured.split())
    assert found["max_logp_error"] < 1e-4
