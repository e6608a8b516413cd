"""Settings of a training run as users give them, in a YAML file, by options or by ``--set``, each with where it stood.

One flat namespace: the fields of `RunConfig`, training arguments, and ``loss_args.NAME`` for each setting of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvpref.cli.run_config import RunConfig
from kvpref.errors import InputError

LOSS_ARG = "loss_args."
"""Before the name of a setting of the loss."""

OWN_NAMES = tuple(item.name for item in fields(RunConfig) if item.name != "training")
"""The settings that are no training arguments."""

_OPTIONS = {
    "model": "MODEL",
    "data": "DATA",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch-size",
    "max_tokens_per_micro_batch": "--max-tokens",
}
"""Options whose name is not the setting's, by setting."""


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
    return _OPTIONS.get(name, "--" + name.replace("_", "-"))


def from_options(values: Mapping[str, Any], loss_args: list[str]) -> Settings:
    """The settings given by options of their own; None stands for what was not given."""
    found = {name: Given(value, option_name(name)) for name, value in values.items() if value is not None}
    for name, value in parse_assignments(loss_args, "--loss-arg").items():
        found[LOSS_ARG + name] = Given(value, f"--loss-arg {name}")
    return found


def from_assignments(assignments: list[str]) -> Settings:
    """The settings given by ``--set``."""
    return _spread(
        {name: Given(value, f"--set {name}") for name, value in parse_assignments(assignments, "--set").items()}
    )


def from_file(path: Path) -> Settings:
    """The settings of a YAML file.

    Raises:
        InputError: If the file cannot be read, is not YAML, or has an unknown key.
    """
    values = _read_yaml(path)
    valid = [*OWN_NAMES, "training"]
    if not isinstance(values, dict):
        raise InputError(f"{path}:1: expected a mapping with keys among: {', '.join(valid)}")
    unknown = [key for key in values if key not in valid]
    if unknown:
        raise InputError(f"{path}: unknown key {unknown[0]!r}; valid keys: {', '.join(valid)}")
    training = values.pop("training", None) or {}
    if not isinstance(training, dict):
        raise InputError(f"{path}: training must be a mapping of training arguments; got {training!r}")
    found = {name: Given(value, f"{path}: {name}") for name, value in values.items()}
    twice = [name for name in training if name in OWN_NAMES]
    if twice:
        raise InputError(f"{path}: {twice[0]} is no training argument; move it out of training")
    return found | _spread({str(name): Given(value, f"{path}: {name}") for name, value in training.items()})


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


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the run configuration: {error}") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where is not None else ""
        raise InputError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
