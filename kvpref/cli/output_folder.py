"""What may stand in a run's output folder before it starts. Checked before torch is imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from kvpref.cli.checkpoints import RECORD_FILE, RESULT_FILE, holds_model, is_checkpoint, numbered_checkpoints
from kvpref.cli.run_config import RUN_FILE
from kvpref.cli.source_paths import local_paths
from kvpref.errors import InputError

_BEFORE_RUN_FILE = ("*.bad_rows.jsonl", "partial-*")
"""What may be left of a start that failed: all else is written after `RUN_FILE`."""

_WRITTEN = (
    RUN_FILE,
    RESULT_FILE,
    RECORD_FILE,
    "metrics.jsonl",
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
)
"""Files and folders that a run writes into its output beside these, and ``checkpoint-STEP``; patterns of `fnmatch`."""


def written_by_runs(output: Path) -> Iterator[Path]:
    """What stands in `output` under names of files and folders that a run writes: checkpoints first."""
    yield from numbered_checkpoints(output)
    for pattern in (*_WRITTEN, *_BEFORE_RUN_FILE):
        yield from sorted(output.glob(pattern))


def check_output(output: Path, sources: Iterable[str], *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder in which a run would overwrite what it should not.

    Args:
        output: The output folder of the new run.
        sources: What the new run reads: files, folders, patterns, or names of a hub.
        resume: Whether it goes on with the run in the folder, where there is one.
        overwrite: Whether it replaces the run in the folder.

    Raises:
        InputError: If it is no folder; holds an earlier run that is neither resumed nor replaced; has files that a run
            would overwrite and none wrote; or if the new run reads such files from there.
    """
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise InputError(f"{nearest}: is a file; --output takes a folder, such as {nearest.with_suffix('')}-run")
    if resume and (output / RUN_FILE).exists():
        return
    for source in sources:
        if any(_is_overwritten(path, output) for path in local_paths(source)):
            raise InputError(f"{output}: the new run reads {source} and would write over it; choose another --output")
    if not is_of_a_run(output / RUN_FILE):
        _refuse_foreign(output, resume)
    elif not overwrite and _holds_training(output):
        raise InputError(
            f"{output}: holds an earlier run; pass --resume to go on with it, --overwrite to replace it, or choose "
            "another --output"
        )


def is_of_a_run(path: Path) -> bool:
    """Whether a file has the settings that every run writes down first."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and {"data", "output", "training"} <= settings.keys()


def _holds_training(output: Path) -> bool:
    return holds_model(output) or bool(numbered_checkpoints(output))


def _refuse_foreign(output: Path, resume: bool) -> None:
    found = (path for path in written_by_runs(output) if not _matches(path.name, _BEFORE_RUN_FILE))
    first = next(found, None)
    if first is None:
        return
    if resume and _holds_training(output):
        raise InputError(
            f"{output}: holds {first.name} but no {RUN_FILE}, so it is of another tool or an older version, and what "
            f"it was trained with is not known; write its settings to {output / RUN_FILE} in the form of --config, or "
            "choose another --output"
        )
    missing = "which is not as a run writes it" if first.name == RUN_FILE else f"but no {RUN_FILE} of a run"
    raise InputError(
        f"{output}: holds {first.name}, {missing}, so it is not a run's, and a new one would overwrite it; move it "
        "away, or choose another --output"
    )


def _is_overwritten(path: Path, output: Path) -> bool:
    """Whether a run in `output` writes to `path`, or to a folder that it is in; or reads the folder as a whole."""
    parts, folder = path.resolve().parts, output.resolve().parts
    if parts[: len(folder)] != folder:
        return False
    inside = parts[len(folder) :]
    return not inside or is_checkpoint(inside[0]) or _matches(inside[0], (*_WRITTEN, *_BEFORE_RUN_FILE))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
