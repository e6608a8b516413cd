"""Which model an evaluation compares with: named, known from the run that made the model, or an adapter's base."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvpref.cli.adapters import is_adapter
from kvpref.cli.given_settings import from_file
from kvpref.cli.run_config import RUN_FILE, RunConfig
from kvpref.cli.setting_types import read_types
from kvpref.cli.source_paths import same_sources
from kvpref.errors import InputError

_REMEDY = "give --reference, the folder or hub name of the model that its training started from"


@dataclass(frozen=True, kw_only=True)
class ReferenceSource:
    """Where a reference comes from."""

    model: str | None
    """Folder or hub name of a second model; None for the model itself with its adapter switched off."""

    description: str
    """For people."""


@dataclass(frozen=True, kw_only=True)
class PastRun:
    """The run that made a model."""

    path: Path
    """Its ``run.yaml``."""

    config: RunConfig
    """What stands in it."""


def find_run(model: str) -> PastRun | None:
    """The run whose output folder, or checkpoint in it, `model` is; None if it is none.

    Raises:
        InputError: If its file cannot be read.
    """
    folder = Path(model)
    folders = (folder, folder.absolute().parent) if folder.name.startswith("checkpoint-") else (folder,)
    for path in (one / RUN_FILE for one in folders):
        if path.is_file():
            settings = read_types(from_file(path))
            return PastRun(path=path, config=RunConfig.of({name: item.value for name, item in settings.items()}))
    return None


def choose_reference(model: str, given: str | None, run: PastRun | None, loss: str) -> ReferenceSource:
    """What a loss that reads a reference compares `model` with.

    Args:
        model: Folder or hub name.
        given: ``--reference``.
        run: That made the model, if it is known.
        loss: Its name, for messages.

    Raises:
        InputError: If none is known, or it is the model itself, with which such a loss says nothing.
    """
    if given is not None:
        _refuse_itself(given, model, "--reference")
        return ReferenceSource(model=given, description=given)
    if run is not None:
        return _of_run(model, run)
    if is_adapter(model):
        return _adapter_off()
    raise InputError(f"loss {loss!r} compares {model} with a reference, and nothing says which; {_REMEDY}")


def _of_run(model: str, run: PastRun) -> ReferenceSource:
    config = run.config
    start = config.training.get("reference_model")
    if start is None and is_adapter(model):
        is_new = config.lora_r is not None  # such an adapter did nothing when it was made
        if is_new or config.training.get("reference") == "base":
            return _adapter_off()
    start = start or config.model
    if start is None:
        raise InputError(f"{run.path}: {model} started from random weights, which are gone; {_REMEDY}")
    if os.path.isabs(start) and not Path(start).exists():
        raise InputError(f"{run.path}: {model} started from {start}, which is no longer there; {_REMEDY}")
    _refuse_itself(start, model, str(run.path))
    return ReferenceSource(model=start, description=f"{start} (where the run started, says {run.path})")


def _adapter_off() -> ReferenceSource:
    return ReferenceSource(model=None, description="the base model, with the adapter off")


def _refuse_itself(reference: str, model: str, where: str) -> None:
    if same_sources(reference, model):
        raise InputError(
            f"{where}: the reference {reference} is the model that is evaluated; of a model against itself such losses "
            f"say nothing (dpo is log 2 for any data); {_REMEDY}"
        )
