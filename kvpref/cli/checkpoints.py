"""What an output folder holds of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvpref.atomic_files import write_text

RESULT_FILE = "result.json"
"""The final metrics; written last, once the model is saved."""

RECORD_FILE = "resume.json"
"""What a resumed run is compared with; see `kvpref.cli.run_record`."""

_CHECKPOINT = "checkpoint-"
_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def find_checkpoint(output: Path, report: Callable[[str], None]) -> str | None:
    """The last complete checkpoint to resume from, or None to start anew.

    A checkpoint is complete once its trainer state, which is written last, can be read: a run may have been killed
    while saving.
    """
    for folder in numbered_checkpoints(output):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            report(f"{folder.name} is incomplete and is passed over")
            continue
        report(f"resuming from {folder.name}")
        return str(folder)
    report("no complete checkpoint to resume from; starting from the beginning")
    return None


def numbered_checkpoints(output: Path) -> list[Path]:
    """The folders named as a run names its checkpoints, the last step first; ``checkpoint-best`` is nobody's."""
    steps = {path: path.name.removeprefix(_CHECKPOINT) for path in output.glob(f"{_CHECKPOINT}*")}
    return sorted((path for path in steps if is_checkpoint(path.name)), key=lambda path: int(steps[path]), reverse=True)


def is_checkpoint(name: str) -> bool:
    """Whether a run gives this name to a checkpoint."""
    return name.startswith(_CHECKPOINT) and name.removeprefix(_CHECKPOINT).isdecimal()


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
