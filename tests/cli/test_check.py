"""`kvpref check`: what each layer does, from a pass that ran."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line_in_process import fail, run

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def config_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file with the census's tiny config of a family."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from census_models import tiny_config

    def write(name: str) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(tiny_config(name).to_dict()))
        return path

    return write


@pytest.fixture
def layers_of(config_of: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """What the command finds in a family's tiny model."""

    def find(name: str) -> dict[str, Any]:
        run("check", "--model-config", config_of(name), "--json")
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["supported"] is True
        return result

    return find


def test_windows_and_softcaps(layers_of: Any) -> None:
    found = layers_of("gemma2")
    windows, full = found["layers"]
    assert (windows["layers"], full["layers"]) == ("0, 2", "1")
    assert (windows["rule"], full["rule"]) == (["window of 5"], ["causal"])
    assert windows["softcap"] == full["softcap"] == 50.0
    assert windows["attention"] == ["Gemma2Attention, 4 heads on 2, dim 16"]
    assert "softcapped at 30" in found["head"]


def test_sinks_and_experts(layers_of: Any) -> None:
    found = layers_of("gpt_oss")
    assert [row["rule"] for row in found["layers"]] == [["window of 5"], ["causal"]]
    assert all(row["sinks"] and row["experts"] == "4, 2 per token" for row in found["layers"])


def test_chunks(layers_of: Any) -> None:
    found = layers_of("llama4_text")
    assert {rule for row in found["layers"] for rule in row["rule"]} == {"chunk of 6", "causal"}


def test_recurrent_layers(layers_of: Any) -> None:
    found = layers_of("qwen3_next")
    recurrent, full = found["layers"]
    assert recurrent["state"] == ["gated delta rule"]
    assert recurrent["attention"] == []
    assert full["rule"] == ["causal"]
    assert full["state"] == []


def test_the_table_groups_equal_layers(config_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run("check", "--model-config", config_of("llama"))
    text = capsys.readouterr().out
    assert "0-1" in text
    assert "causal" in text
    assert "head: linear" in text


def test_refused_families_say_why(config_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not route attention" in fail(capsys, "check", "--model-config", config_of("bloom"))
