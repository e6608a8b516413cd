"""What a run's file holds."""

from __future__ import annotations

from pathlib import Path

import yaml

from kvpref.cli.run_config import RunConfig


def test_a_token_of_a_hub_is_not_written_down(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    RunConfig(model="m", training={"hub_token": "hf_secret", "loss": "ipo"}).save(path)
    assert "hf_secret" not in path.read_text()
    assert yaml.safe_load(path.read_text())["training"] == {"loss": "ipo"}
