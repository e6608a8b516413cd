"""`kvpref losses`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpref.cli.app import app
from kvpref.losses import LOSSES

runner = CliRunner()


def test_the_list_names_every_loss_with_its_settings() -> None:
    done = runner.invoke(app, ["losses", "--json"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    listed = json.loads(lines[-1])
    assert [item["name"] for item in listed["losses"]] == list(LOSSES)
    assert listed["broken"] == {}
    start = next(index for index, line in enumerate(lines) if line.startswith("dpo "))
    assert "Sigmoid DPO" in lines[start]
    assert "mean over groups; reference: yes; settings: beta=0.1 " in lines[start + 1]


def test_one_loss_in_full() -> None:
    done = runner.invoke(app, ["losses", "dpo", "--json"])
    assert done.exit_code == 0
    assert "arXiv 2305.18290" in done.stdout
    assert "  beta=0.1  Strength of the pull" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["needs_reference"] is True


def test_the_learning_rate_with_its_source() -> None:
    done = runner.invoke(app, ["losses", "sft", "--json"])
    assert "none is given: 2e-05; 0.0002 where only an adapter is trained" in done.stdout
    assert "Source: the SFT recipes of Zephyr 7B beta" in done.stdout
    rates = json.loads(done.stdout.splitlines()[-1])["learning_rates"]
    assert (rates["full"], rates["adapter"]) == (2e-5, 2e-4)
    assert "alignment-handbook" in rates["source"]
    done = runner.invoke(app, ["losses", "mixture", "--json"])
    assert "none is given: by settings" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["learning_rates"] == "by settings"


def test_a_loss_of_a_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text('def margin(policy, reference, batch, *, beta):\n    """A margin."""\n')
    done = runner.invoke(app, ["losses", f"{path}:margin"])
    assert done.exit_code == 0
    assert "A margin." in done.stdout
    assert "  beta=?" in done.stdout
    assert "Source: as for dpo, since the loss declares none" in done.stdout


def test_a_broken_package_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvpref.losses]\ngood = plugin_good:f\nbad = plugin_bad:f\n")
    (tmp_path / "plugin_good.py").write_text('def f(policy, reference, batch, *, beta=2):\n    """Good."""\n')
    (tmp_path / "plugin_bad.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    listed = json.loads(runner.invoke(app, ["losses", "--json"]).stdout.splitlines()[-1])
    assert listed["losses"][-1]["name"] == "good"
    assert listed["losses"][-1]["settings"][0]["default"] == 2
    assert "plugin_bad.py:1: ModuleNotFoundError: No module named 'no_such_package'" in listed["broken"]["bad"]
