"""Names of models, tokenizers and data that cannot be meant: answered before torch is imported or a hub is asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpref.cli.checkpoints import numbered_checkpoints
from kvpref.cli.nearest import nearest
from kvpref.cli.source_paths import local_paths
from kvpref.data.reading.files import source_files
from kvpref.data.reading.sources.parts import is_pattern, parse_source
from kvpref.errors import InputError

_MODELS = ("model", "tokenizer", "reference", "reference_model")
_DATA = ("data", "eval_data")
_CONFIGS = ("config.json", "adapter_config.json")


def check_sources(values: Mapping[str, Any]) -> None:
    """Refuse what names nothing on this machine and cannot be a name of a hub, and a model that is none.

    Args:
        values: Settings of a run, or parameters of a command; those that name models, tokenizers or data are read.

    Raises:
        InputError: With the nearest name that there is.
    """
    sources = {name: _as_list(values.get(name)) for name in (*_MODELS, *_DATA)}
    for model in sources["model"]:
        _check_model(model, sources["data"])
    for name in _MODELS:
        for source in sources[name]:
            _check_exists(source, "models", is_data=False)
    for name in _DATA:
        for source in sources[name]:
            _check_data(source)


def refuse_to_write_over(output: Path, values: Mapping[str, Any]) -> None:
    """Refuse an output file that the command reads.

    Args:
        output: The file to write.
        values: Parameters of the command, as in `check_sources`.

    Raises:
        InputError: If it is such a file, or one in a folder of data.
    """
    if not output.exists():
        return
    for name in (*_MODELS, "model_config", *_DATA):
        for source in _as_list(values.get(name)):
            for path in local_paths(source):
                if output.samefile(path) or (name in _DATA and path.resolve() in output.resolve().parents):
                    raise InputError(f"{output}: is what the command reads ({source}); choose another --output")


def describes_model(folder: Path) -> bool:
    """Whether a folder describes a model or an adapter."""
    return any((folder / name).is_file() for name in _CONFIGS)


def _as_list(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [item for item in values if isinstance(item, str) and item]


def _check_model(model: str, data: list[str]) -> None:
    """Refuse a file or folder that holds no model; one of another kind than data may be meant."""
    path = Path(model)
    other = next((source for source in data if describes_model(Path(source))), None)
    is_name = not path.exists() and not _is_path(model, "models")
    if is_name or describes_model(path):
        return
    if other is not None:
        raise InputError(
            f"MODEL and DATA seem to be swapped: {model} holds no model, and {other} does; give the model first"
        )
    if not path.exists() or path.suffix == ".json":
        return
    if path.is_file():
        raise InputError(f"{model}: is a file where MODEL is expected: a folder with config.json, or a hub name")
    folders = (*numbered_checkpoints(path), *sorted(path.iterdir()))
    inside = next((folder for folder in folders if describes_model(folder)), None)
    hint = f"; did you mean {inside}?" if inside else f": there is no {_CONFIGS[0]}, nor {_CONFIGS[1]}"
    raise InputError(f"{model}: the folder holds no model{hint}")


def _check_data(source: str) -> None:
    name, _ = parse_source(source)
    if Path(name).exists() or is_pattern(name):
        return
    _check_exists(name, "datasets", is_data=True)
    try:
        source_files(name)  # knows the endings of files
    except InputError as error:
        raise InputError(f"{error}{_did_you_mean(Path(name), is_data=True)}") from None


def _check_exists(name: str, kind: str, *, is_data: bool) -> None:
    if Path(name).exists() or not _is_path(name, kind):
        return
    what = "file or folder" if is_data or name.endswith(".json") else "folder"
    raise InputError(f"{name}: there is no such {what}{_did_you_mean(Path(name), is_data=is_data)}")


def _is_path(name: str, kind: str) -> bool:
    """Whether what is not there can be no name of a hub, or should be none: its folder is here."""
    if "://" in name:
        return False
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".json"):
        return True
    return "/" in name and Path(name).parent.is_dir() and not _is_cached(name, kind)


def _is_cached(name: str, kind: str) -> bool:
    """Whether something of this name was fetched from the hub before, although a folder is called as its owner."""
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}" / "snapshots").is_dir()


def _did_you_mean(path: Path, *, is_data: bool) -> str:
    """The end of a message: the nearest path that there is, or nothing."""
    path = path.expanduser()
    missing = path
    while not missing.exists() and not missing.parent.exists():
        missing = missing.parent
    if missing.exists():
        return f"; did you mean {missing}?"
    try:
        endings = (".json",) if path.suffix == ".json" else ()
        found = (item for item in missing.parent.iterdir() if is_data or item.is_dir() or item.suffix in endings)
        beside = sorted(item.name for item in found)
    except OSError:
        return ""
    near = nearest(missing.name, beside)
    if near is None:
        return ""
    whole = missing.parent / near / path.relative_to(missing)
    return f"; did you mean {whole if whole.exists() else missing.parent / near}?"
