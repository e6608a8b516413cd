"""What a run's file holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kvpref.cli.given_settings import from_file
from kvpref.cli.run_config import RunConfig, sources_of


def test_a_token_of_a_hub_is_not_written_down(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    RunConfig(model="m", training={"hub_token": "hf_secret", "loss": "ipo"}).save(path)
    assert "hf_secret" not in path.read_text()
    assert yaml.safe_load(path.read_text())["training"] == {"loss": "ipo"}


def test_a_loss_stays_a_name_where_a_folder_is_called_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dpo").mkdir()
    (tmp_path / "my_loss.py").touch()
    assert RunConfig(training={"loss": "dpo"}).with_absolute_paths().training["loss"] == "dpo"
    own = RunConfig(training={"loss": "my_loss.py:f"}).with_absolute_paths().training["loss"]
    assert own == f"{tmp_path / 'my_loss.py'}:f"


def test_what_a_run_reads_is_named() -> None:
    settings = {"loss": "dpo", "reference_model": "r"}
    config = RunConfig(model="m", data=["d", "e"], output="dpo", training=settings)
    assert set(sources_of(config.flat())) == {"m", "d", "e", "r"}
    assert sources_of({"loss": "mine.py:f"}) == ["mine.py:f"]


def test_files_of_earlier_versions_call_the_models_json_config(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("config: tiny.json\ndata: pairs.jsonl\n")
    assert {name: item.value for name, item in from_file(path).items()} == {
        "model_config": "tiny.json",
        "data": "pairs.jsonl",
    }
