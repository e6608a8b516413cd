"""``--overwrite``: what an earlier run left in an output folder is deleted, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from kvpref.cli.checkpoints import RESULT_FILE, holds_run
from kvpref.cli.run_config import RUN_FILE
from kvpref.cli.run_record import RECORD_FILE
from kvpref.errors import InputError, RunError

_WRITTEN = (
    RUN_FILE,
    RESULT_FILE,
    RECORD_FILE,
    "metrics.jsonl",
    "*.bad_rows.jsonl",
    "reference_logps",
    "training_args.bin",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "trial-of-saving",
    "partial-*",
)
"""Files and folders that a run writes into its output, beside ``checkpoint-STEP``; patterns of `Path.glob`."""

Found = Mapping[Path, int]
"""What an earlier run wrote, with the time of its last change in ns."""


def find_earlier_run(output: Path, sources: Iterable[str]) -> Found:
    """What `delete_earlier_run` is to delete.

    Args:
        output: The output folder of the new run.
        sources: The files and folders that the new run reads.

    Raises:
        InputError: If a model or checkpoints there are not of a run of kvpref, or the new run reads from the folder.
    """
    if not _is_of_a_run(output / RUN_FILE):
        if holds_run(output):
            raise InputError(
                f"{output}: holds a model or checkpoints but no {RUN_FILE} of kvpref's, so no run wrote them, and "
                "--overwrite deletes only what one wrote; choose another --output"
            )
        return {}
    folder = output.resolve()
    for source in sources:
        path = Path(source).resolve()
        if folder in (path, *path.parents):
            raise InputError(f"{output}: the new run reads {source} from there; --overwrite needs another --output")
    steps = (path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit())
    found = {*steps, *(path for pattern in _WRITTEN for path in output.glob(pattern))}
    return {path: path.lstat().st_mtime_ns for path in sorted(found)}


def _is_of_a_run(path: Path) -> bool:
    """Whether a file has the settings that every run writes down."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and {"data", "output", "training"} <= settings.keys()


def delete_earlier_run(found: Found) -> None:
    """Delete what `find_earlier_run` found, but for what was written since.

    Raises:
        RunError: If something cannot be deleted.
    """
    for path, changed_ns in found.items():
        try:
            if path.lstat().st_mtime_ns != changed_ns:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise RunError(f"cannot delete {path} of the earlier run: {error.strerror or error}") from error
