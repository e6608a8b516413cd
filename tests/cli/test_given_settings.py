"""Where settings come from: positions, options, a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvpref.cli.given_settings import from_assignments, from_file, place_positions
from kvpref.errors import InputError


@pytest.mark.parametrize(
    ("positions", "options", "expected"),
    [
        (["m", "d"], {}, ("m", ["d"])),
        (["m"], {}, ("m", [])),
        ([], {}, (None, [])),
        (["d"], {"model": "m"}, ("m", ["d"])),
        (["m"], {"dataset": "d"}, ("m", ["d"])),
        ([], {"model": "m", "dataset": "d"}, ("m", ["d"])),
        (["d", "e"], {"model_config": "c.json"}, (None, ["d", "e"])),
        ([], {"model_config": "c.json", "dataset": "d"}, (None, ["d"])),
    ],
)
def test_model_and_data_by_position_or_by_option(positions: list[str], options: dict[str, Any], expected: Any) -> None:
    given = {"model": None, "dataset": None, "model_config": None} | options
    assert place_positions(positions, **given) == expected


def test_both_ways_at_once_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="the data was given as d and as --dataset-name e"):
        place_positions(["m", "d"], model=None, dataset="e", model_config=None)
    with pytest.raises(InputError, match=r"the model was given as .* and as --model-name-or-path m"):
        place_positions([str(tmp_path), "d"], model="m", dataset=None, model_config=None)
    with pytest.raises(InputError, match="--model-name-or-path names a model, --model-config one with random weights"):
        place_positions(["d"], model="m", dataset=None, model_config="c.json")


TRL = """\
model_name_or_path: m
dataset_name: d
output_dir: o
num_train_epochs: 2
per_device_train_batch_size: 4
learning_rate: 5.0e-7
bf16: true
lora_r: 16
loss_args:
  beta: 0.2
"""


def test_a_file_may_have_the_keys_of_trl(tmp_path: Path) -> None:
    path = tmp_path / "trl.yaml"
    path.write_text(TRL)
    given = from_file(path)
    assert {name: item.value for name, item in given.items()} == {
        "model": "m",
        "data": "d",
        "output": "o",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-7,
        "bf16": True,
        "lora_r": 16,
        "loss_args.beta": 0.2,
    }
    assert given["learning_rate"].where == f"{path}:6: learning_rate"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nmodel_name_or_path: n\n", r":2: model_name_or_path: given twice, see .*:1: model"),
        ("max_steps: 1\ntraining:\n  max_steps: 2\n", r":3: max_steps: given twice, see line 1"),
        ("epochs: 1\nepochs: 2\n", r":2: epochs: given twice, see line 1"),
        ("training:\n  data: d\n", r":2: data: is no training argument; move it out of training"),
        ("model_type: llama\n", r"describes a model, not a run; give it to --model-config"),
        ("- a\n", r":1: expected a mapping of settings"),
        ("a: [\n", r":2: not valid YAML"),
    ],
)
def test_a_file_that_says_things_twice_or_nothing_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        from_file(path)


def test_one_setting_under_two_names_is_given_twice() -> None:
    with pytest.raises(InputError, match="--set epochs: given twice, see --set num_train_epochs"):
        from_assignments(["num_train_epochs=1", "epochs=2"])
