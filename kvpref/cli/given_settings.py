"""Settings of a training run as users give them, in a YAML file, by options or by ``--set``, each with where it stood.

One flat namespace: the fields of `RunConfig`, training arguments, and ``loss_args.NAME`` for each setting of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvpref.cli.other_names import SHORT_OPTIONS, setting_name
from kvpref.cli.run_config import RunConfig
from kvpref.errors import InputError

LOSS_ARG = "loss_args."
"""Before the name of a setting of the loss."""

OWN_NAMES = tuple(item.name for item in fields(RunConfig) if item.name != "training")
"""The settings that are no training arguments."""

_SPELT = {"model": "MODEL", "data": "DATA", "column_names": "--column"}
"""Settings that the command line calls something else."""

_OLD_KEYS = {"config": "model_config"}
"""What a file may still call a setting."""


@dataclass(frozen=True)
class Given:
    """One setting.

    Args:
        value: As it was given, or as `read_types` made it.
        where: What to call it in a message, such as ``--learning-rate`` or ``run.yaml: learning_rate``.
    """

    value: Any
    where: str


Settings = dict[str, Given]


def option_name(name: str) -> str:
    """What the command line calls a setting that has an option."""
    short = {long: option for option, long in SHORT_OPTIONS.items()}
    return _SPELT.get(name, "--" + short.get(name, name).replace("_", "-"))


def place_positions(
    positions: list[str], *, model: str | None, dataset: str | None, model_config: str | None
) -> tuple[str | None, list[str]]:
    """MODEL and DATA of a command line, by position or by the options that TRL has for them.

    Args:
        positions: The first is the model, unless an option gives one; all others are data.
        model: As given by ``--model-name-or-path``.
        dataset: As given by ``--dataset-name``.
        model_config: As given by ``--model-config``, which leaves no model to name.

    Raises:
        InputError: If one was given in both ways.
    """
    if model is not None and model_config is not None:
        raise InputError("--model-name-or-path names a model, --model-config one with random weights; leave one out")
    data = list(positions)
    if model is None and model_config is None and data:
        model = data.pop(0)
    elif model is not None and data and (Path(data[0]) / "config.json").is_file():
        raise InputError(f"the model was given as {data[0]} and as --model-name-or-path {model}; leave one out")
    if dataset is not None and data:
        raise InputError(f"the data was given as {data[0]} and as --dataset-name {dataset}; leave one out")
    return model, data if dataset is None else [dataset]


def from_options(values: Mapping[str, Any], loss_args: list[str]) -> Settings:
    """The settings given by options of their own; None stands for what was not given."""
    given = {SHORT_OPTIONS.get(name, name): value for name, value in values.items() if value is not None}
    found = {name: Given(value, option_name(name)) for name, value in given.items()}
    for name, value in parse_assignments(loss_args, "--loss-arg").items():
        found[LOSS_ARG + name] = Given(value, f"--loss-arg {name}")
    return found


def from_assignments(assignments: list[str]) -> Settings:
    """The settings given by ``--set``, by their own names or those of `SAME`."""
    found: Settings = {}
    for name, value in parse_assignments(assignments, "--set").items():
        setting = setting_name(name)
        if setting in found:
            raise InputError(f"--set {name}: given twice, see {found[setting].where}; leave one of them out")
        found[setting] = Given(value, f"--set {name}")
    return _spread(found)


def from_file(path: Path) -> Settings:
    """The settings of a YAML file: by the names of the settings or of `SAME`, training arguments also in ``training``.

    Raises:
        InputError: If the file cannot be read, is not YAML, describes a model, or gives a setting twice.
    """
    values, lines = _read_yaml(path)
    if "model_type" in values:
        raise InputError(f"{path}: describes a model, not a run; give it to --model-config")
    training = values.pop("training", None) or {}
    if not isinstance(training, dict):
        raise InputError(f"{path}: training must be a mapping of training arguments; got {training!r}")
    found: Settings = {}
    for key, value in (*values.items(), *training.items()):
        name = _OLD_KEYS.get(key, setting_name(str(key)))
        where = f"{path}:{lines.get(str(key), 1)}: {key}"
        if name in found:
            raise InputError(f"{where}: given twice, see {found[name].where}; leave one of them out")
        if key in training and name in OWN_NAMES:
            raise InputError(f"{where}: is no training argument; move it out of training")
        found[name] = Given(value, where)
    return _spread(found)


def merge(file: Settings, options: Settings, assigned: Settings) -> Settings:
    """All of them, the command line over the file.

    Raises:
        InputError: If one was given by its own option and by ``--set``.
    """
    twice = sorted(options.keys() & assigned.keys())
    if twice:
        raise InputError(f"--set {twice[0]}: this was given by its own option too; leave one of them out")
    return file | options | assigned


def parse_assignments(assignments: list[str], option: str) -> dict[str, Any]:
    """``["a=1", "b=x"]`` to ``{"a": 1, "b": "x"}``, values read as YAML.

    Raises:
        InputError: If one has no ``=``, its value is not YAML, or it was given twice.
    """
    import yaml

    parsed: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise InputError(f"{option} {assignment!r}: expected NAME=VALUE")
        if name in parsed:
            raise InputError(f"{option} {name}: given twice; leave one of them out")
        try:
            parsed[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{option} {assignment!r}: cannot read the value: {reason}") from error
    return parsed


def _spread(training: Settings) -> Settings:
    """Training arguments with the settings of the loss one by one, so that each may come from elsewhere."""
    given = training.pop("loss_args", None)
    if given is None or given.value is None:
        return training
    if not isinstance(given.value, dict):
        raise InputError(f"{given.where}: expected a mapping of settings of the loss; got {given.value!r}")
    return training | {
        f"{LOSS_ARG}{name}": Given(value, f"{given.where}.{name}") for name, value in given.value.items()
    }


def _read_yaml(path: Path) -> tuple[dict[Any, Any], dict[Any, int]]:
    """The mapping that a file holds, and the line of each of its keys, those in ``training`` among them."""
    import yaml

    try:
        text = path.read_text()
        values, root = yaml.safe_load(text) or {}, yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the run configuration: {error}") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where is not None else ""
        raise InputError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}:1: expected a mapping of settings, such as learning_rate: 1e-6; got {values!r:.40}")
    lines: dict[Any, int] = {}
    pending = [] if root is None else [*root.value]
    for key, value in pending:
        line = key.start_mark.line + 1
        if key.value in lines:
            raise InputError(f"{path}:{line}: {key.value}: given twice, see line {lines[key.value]}; leave one out")
        lines[key.value] = line
        if key.value == "training" and isinstance(value, yaml.MappingNode):
            pending += value.value
    return values, lines
