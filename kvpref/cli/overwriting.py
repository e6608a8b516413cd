"""``--overwrite``: what an earlier run left in an output folder is deleted, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from kvpref.cli.output_folder import is_of_a_run, written_by_runs
from kvpref.cli.run_config import RUN_FILE
from kvpref.errors import RunError

Found = Mapping[Path, int]
"""What an earlier run wrote, with the time of its last change in ns."""


def find_earlier_run(output: Path) -> Found:
    """What `delete_earlier_run` is to delete in a folder that `check_output` admits; nothing where no run was."""
    if not is_of_a_run(output / RUN_FILE):
        return {}
    return {path: path.lstat().st_mtime_ns for path in sorted(written_by_runs(output))}


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
