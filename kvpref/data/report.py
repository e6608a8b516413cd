"""What loading left out or cut, so that nothing is dropped silently."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from kvpref.atomic_files import write_text
from kvpref.data.reading.rows import PreferenceRow


@dataclass(frozen=True)
class BadRow:
    """A row that could not become a group.

    Args:
        location: ``file:line`` (JSON lines), ``file:row N`` (JSON, tables, datasets) or ``row N`` (in memory), counted
            from 1.
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

    num_scaled_images: int = 0
    """Images that had more pixels than `max_image_pixels`, each counted once."""

    notices: tuple[str, ...] = ()
    """What was done that the data does not say itself, and what of it is not read: one line each."""

    def lines(self) -> tuple[str, ...]:
        """The report in words: the counts, then the notices."""
        counts = (
            f"{self.source}: {self.num_groups} groups; {len(self.bad_rows)} bad rows skipped; "
            f"{self.num_truncated_prompts} prompts and {self.num_truncated_responses} responses cut"
        )
        scaled = f"{self.num_scaled_images} images scaled down to the limit of pixels"
        return counts, *([scaled] if self.num_scaled_images else []), *self.notices

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


class Notes:
    """Counts what notices are made of, row by row.

    Attributes:
        unread: Names of columns that nothing reads.
    """

    def __init__(self) -> None:
        self.unread: set[str] = set()
        self._prompt_columns: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()

    def add(self, row: PreferenceRow) -> None:
        """Count a row that became a group."""
        self.unread.update(row.unread)
        if row.prompt_column is not None:
            self._prompt_columns[row.prompt_column] += 1
        self._kinds["conversation" if isinstance(row.prompt, tuple) else "text"] += 1
        self._kinds["implicit"] += row.prompt is None
        self._kinds["asked"] += row.is_asked_by_user
        self._kinds["repeated"] += _repeats_prompt(row)

    def lines(self) -> tuple[str, ...]:
        """The notices; the same for the same rows, whatever they were read from."""
        lines = []
        for name, count in sorted(self._prompt_columns.items()):
            beside = " (with `input` on a line of its own, where there is one)" if name == "instruction" else ""
            lines.append(f"`{name}`{beside} is taken as the prompt, since there is no `prompt` ({_rows(count)})")
        if self._kinds["implicit"]:
            lines.append(
                "the beginning that `chosen` and `rejected` have in common is taken as the prompt, since there is no "
                f"column of it ({_rows(self._kinds['implicit'])})"
            )
        if self._kinds["repeated"]:
            lines.append(
                "every response begins with the text of the prompt, which the model then sees twice; take it out of "
                f"the responses if that is not meant ({_rows(self._kinds['repeated'])})"
            )
        if self._kinds["text"] and self._kinds["conversation"]:
            lines.append(
                f"plain text and conversations are mixed: {_rows(self._kinds['text'])} of plain text, "
                f"{self._kinds['conversation']} written by the chat template"
            )
        if self._kinds["asked"]:
            lines.append(
                "a text prompt with images is written as the user's message, by the chat template "
                f"({_rows(self._kinds['asked'])})"
            )
        if self.unread:
            names = ", ".join(f"`{name}`" for name in sorted(self.unread))
            lines.append(f"columns that nothing reads, at least in some rows: {names}")
        return tuple(lines)


def _repeats_prompt(row: PreferenceRow) -> bool:
    prompt = row.prompt
    if not isinstance(prompt, str) or not prompt:
        return False
    return all(isinstance(response, str) and response.startswith(prompt) for response in row.responses)


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"
