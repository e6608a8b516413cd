"""What an output folder holds of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvpref.atomic_files import write_text
from kvpref.errors import InputError

RESULT_FILE = "result.json"
"""The final metrics; written last, once the model is saved."""

_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def find_checkpoint(output: Path, *, resume: bool, overwrite: bool, report: Callable[[str], None]) -> str | None:
    """The last complete checkpoint to resume from, or None to start anew.

    A checkpoint is complete once its trainer state, which is written last, can be read: a run may have been killed
    while saving.

    Raises:
        InputError: If the folder holds an earlier run that is neither to be resumed nor to be overwritten.
    """
    folders = sorted(output.glob("checkpoint-*"), key=lambda path: _step_of(path.name), reverse=True)
    if not resume:
        if holds_run(output) and not overwrite:
            raise InputError(
                f"{output}: holds an earlier run; pass --resume to go on with it, --overwrite to replace it, or choose "
                "another --output"
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


def holds_run(output: Path) -> bool:
    """Whether there is anything that a new run would overwrite."""
    return holds_model(output) or next(output.glob("checkpoint-*"), None) is not None


def holds_model(output: Path) -> bool:
    """Whether there is a model's or an adapter's weights."""
    return any((output / name).exists() for name in _MODEL_FILES)


def save_result(output: Path, metrics: Mapping[str, Any], length: Mapping[str, Any]) -> None:
    """Write down that a run of this length has reached its end."""
    write_text(output / RESULT_FILE, json.dumps({"length": length, "metrics": metrics}))


def read_result(output: Path, length: Mapping[str, Any]) -> dict[str, Any] | None:
    """The final metrics of a run of this length that reached its end, its model still there; otherwise None."""
    try:
        result = json.loads((output / RESULT_FILE).read_text())
    except (OSError, ValueError):
        return None
    return result["metrics"] if result["length"] == length and holds_model(output) else None


def _step_of(name: str) -> int:
    suffix = name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1
