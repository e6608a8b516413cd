"""What an output folder holds of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from kvpref.errors import InputError

_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def find_checkpoint(output: Path, *, resume: bool, report: Callable[[str], None]) -> str | None:
    """The last complete checkpoint to resume from, or None to start anew.

    A checkpoint is complete once its trainer state, which is written last, can be read: a run may have been killed
    while saving.

    Raises:
        InputError: If the folder holds checkpoints and the run is not to be resumed; nothing saved is overwritten.
    """
    folders = sorted(output.glob("checkpoint-*"), key=lambda path: _step_of(path.name), reverse=True)
    if not resume:
        if folders or any((output / name).exists() for name in _MODEL_FILES):
            raise InputError(
                f"{output}: holds an earlier run; pass --resume to go on with it, or choose another --output"
            )
        return None
    for folder in folders:
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            report(f"{folder.name} is incomplete and is passed over")
            continue
        report(f"resuming from {folder.name}")
        return str(folder)
    report("no complete checkpoint to resume from; starting from the beginning")
    return None


def _step_of(name: str) -> int:
    suffix = name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1
