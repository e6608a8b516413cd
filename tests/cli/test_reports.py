"""`kvpref train --report-to`: metrics arrive where they are sent, under the trainer's names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from command_line_in_process import fail, run


def test_metrics_arrive_in_tensorboard(
    config_file: Path, tokenizer_dir: Path, pairs_file: Path, tmp_path: Path
) -> None:
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra kvpref[tensorboard]"
    )
    output = tmp_path / "out"
    run(
        *("train", "--model-config", config_file, pairs_file, "--tokenizer", tokenizer_dir, "--output", output),
        *("--loss", "simpo", "--eval-data", pairs_file, "--max-steps", 2, "--logging-steps", 1),
        *("--report-to", "tensorboard", "--set", "use_cpu=true"),
    )
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in logged if "rewards/accuracies" in line}
    evaluated = next(line for line in logged if "eval_loss" in line)
    found: dict[str, dict[int, float]] = {}
    for folder in (output / "runs").iterdir():
        events = accumulators.EventAccumulator(str(folder)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    for name in ("loss", "rewards/accuracies", "rewards/margins"):
        assert found[f"train/{name}"] == pytest.approx({step: steps[step][name] for step in (1, 2)}, rel=1e-6)
        assert found[f"eval/{name}"] == pytest.approx({2: evaluated[f"eval_{name}"]}, rel=1e-6)
    assert yaml.safe_load((output / "run.yaml").read_text())["training"]["report_to"] == ["tensorboard"]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_named_with_its_extra_before_anything_is_loaded(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (name, "tensorboardX"):
        monkeypatch.setitem(sys.modules, module, None)
    error = fail(
        capsys,
        *("train", "org/model", "org/data", "--output", tmp_path / "out", "--set", "use_cpu=true"),
        *("--report-to", name),
    )
    expected = f"--report-to: the package for '{name}' is not installed; pip install \"kvpref[{name}]\", or choose none"
    assert expected in error
    assert not (tmp_path / "out").exists()
