"""``--accelerate-config``: sets, from a file, the environment that accelerate's launcher would give each rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpref.errors import InputError
from kvpref.ranks import num_started

_FOLDER = Path(__file__).with_name("accelerate_configs")
READY = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
"""Names of the configurations that come with kvpref."""

_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")
_DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
_NOT_TAKEN = ("OMP_NUM_THREADS", "PYTHONPATH")


def find_config(name: str, where: str) -> str:
    """`name` if it is a ready configuration, else the absolute path of the file that it names.

    Raises:
        InputError: If it is neither.
    """
    if name in READY:
        return name
    if not Path(name).is_file():
        raise InputError(
            f"{where}: there is no file {name!r}, and the ready configurations are: {', '.join(READY)}; "
            "accelerate config --config_file FILE writes one"
        )
    return os.path.abspath(name)


def read_config(name: str) -> dict[str, Any]:
    """The settings of a configuration found by `find_config`.

    Raises:
        InputError: If it cannot be read, or is not for ranks that this command can start.
    """
    import yaml

    path = _path(name)
    try:
        values = yaml.safe_load(path.read_text())  # JSON is YAML too
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot read the configuration of accelerate: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a configuration of accelerate, a mapping; got {type(values).__name__}")
    kind = values.get("distributed_type")
    if values.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE" or kind not in _KINDS:
        raise InputError(
            f"{path}: kvpref trains with distributed_type {', '.join(_KINDS)} on machines of your own (LOCAL_MACHINE); "
            f"got {kind} in {values.get('compute_environment')}"
        )
    return values


def num_processes_of(name: str, where: str) -> int:
    """How many processes on this machine a configuration asks for.

    Raises:
        InputError: If it does not say, or wants several machines.
    """
    values = read_config(name)
    if (values.get("num_machines") or 1) > 1:
        raise InputError(
            f"{where}: {name} is for {values['num_machines']} machines; start kvpref train with torchrun or accelerate "
            "launch on each of them (docs/many_ranks.md)"
        )
    number = values.get("num_processes")
    if not isinstance(number, int) or number < 1:
        raise InputError(f"{where}: {name} does not say how many processes to start; give --num-processes")
    return number


def use_config(name: str, where: str) -> None:
    """Set this rank's environment as accelerate's launcher would.

    Raises:
        InputError: If this process is alone, or accelerate refuses the configuration.
    """
    if num_started() == 1:
        raise InputError(
            f"{where}: {name} says how several processes train together, and this one is alone; give --num-processes "
            "N, or start it with torchrun"
        )
    os.environ.update(_environment(name))


def _environment(name: str) -> Mapping[str, str]:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    read_config(name)
    path, number = _path(name), str(num_started())
    arguments = ["--config_file", str(path), "--num_processes", number, "--num_machines", "1", "--machine_rank", "0"]
    # The launcher's own port is in use; 0 lets accelerate find any other.
    arguments += ["--main_process_port", "0", "--num_cpu_threads_per_process", "1", "kvpref"]
    try:
        args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            environment = prepare_deepspeed_cmd_env(args)[1]
        else:
            environment = prepare_multi_gpu_env(args)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"{path}: accelerate cannot use this configuration: {_one_line(error)}") from error
    found = {key: value for key, value in environment.items() if os.environ.get(key) != value and key not in _NOT_TAKEN}
    if _DEEPSPEED_FILE in found:
        found[_DEEPSPEED_FILE] = _beside(path, found[_DEEPSPEED_FILE])
    return found


def _beside(path: Path, file: str) -> str:
    """A file named in a configuration: beside it, or relative to the working folder."""
    other = path.parent / file
    return str(other if other.is_file() else Path(file).absolute())


def _path(name: str) -> Path:
    return _FOLDER / f"{name}.yaml" if name in READY else Path(name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
