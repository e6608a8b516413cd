"""What loading left out or cut, so that nothing is dropped silently."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from kvpref.atomic_files import write_text


@dataclass(frozen=True)
class BadRow:
    """A row that could not become a group.

    Args:
        location: ``file:line`` (JSON lines) or ``file:row N`` (JSON, Parquet, datasets), counted from 1.
        reason: What was found and what was expected.
    """

    location: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What `load_preferences` read, left out and cut."""

    source: str
    """The file or dataset that was read."""

    num_rows: int
    """Rows read, good and bad. Blank lines of a JSON lines file are not rows."""

    num_groups: int
    """Rows that became groups."""

    bad_rows: tuple[BadRow, ...] = ()
    """The rows that were skipped, in the order of the file."""

    num_truncated_prompts: int = 0
    """Groups whose prompt was cut."""

    num_truncated_responses: int = 0
    """Responses that were cut. One that lost only its EOS token counts too."""

    prompt_tokens_cut: int = 0
    """Prompt tokens that were cut, a shared prompt counted once per group."""

    response_tokens_cut: int = 0
    """Response tokens that were cut, EOS included."""

    def write_bad_rows(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object ``{"location", "reason"}`` per bad row; the file is empty when there are none.

        Raises:
            RunError: If the file cannot be written.
        """
        lines = [
            json.dumps({"location": row.location, "reason": row.reason}, ensure_ascii=False) for row in self.bad_rows
        ]
        # A reason may quote a text with a lone surrogate, which UTF-8 cannot hold.
        write_text(Path(path), "".join(f"{line}\n" for line in lines), errors="backslashreplace")
