"""What loading left out or cut, so that nothing is dropped silently."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
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
    """Rows that became groups; if a row is a model call, the rows of one task are one group, and if a row is one
    response, so are the rated rows of one prompt."""

    bad_rows: tuple[BadRow, ...] = ()
    """The rows that were skipped, in the order of the file."""

    num_truncated_prompts: int = 0
    """Groups whose prompt was cut."""

    num_truncated_responses: int = 0
    """Responses that were cut, including those that lost only their EOS token."""

    prompt_tokens_cut: int = 0
    """Prompt tokens that were cut, a shared prompt counted once per group."""

    response_tokens_cut: int = 0
    """Response tokens that were cut, EOS included."""

    num_trajectories: int = 0
    """Attempts at tasks, or responses in rows of model calls."""

    num_turns: int = 0
    """Scored assistant turns of trajectories."""

    num_rewritten: int = 0
    """Trajectories that take several token rows, because the chat template or the agent rewrites the history."""

    num_earlier_parts: int = 0
    """Token rows that these take beyond one each."""

    rewritten_tokens: int = 0
    """Tokens of those rows that their next row does not begin with: the cost beyond their last rows alone."""

    num_branches: int = 0
    """Histories that attempts answer in different ways, if turns form groups."""

    num_single: int = 0
    """Histories with only one answer, which are then left out."""

    num_pairs: int = 0
    """Groups of trajectories reduced to the best and the worst response, if a loss reads pairs."""

    num_equal: int = 0
    """Groups without two different scores, which are then left out."""

    num_scaled_images: int = 0
    """Images that had more pixels than `max_image_pixels`, each counted once."""

    notices: tuple[str, ...] = ()
    """One line for each choice that the data does not state, and for anything not read."""

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


COUNTED = (
    "num_truncated_prompts",
    "num_truncated_responses",
    "prompt_tokens_cut",
    "response_tokens_cut",
    "num_trajectories",
    "num_turns",
    "num_rewritten",
    "num_earlier_parts",
    "rewritten_tokens",
    "num_branches",
    "num_single",
    "num_pairs",
    "num_equal",
)
"""The fields of a report that are counted while groups are made."""


def trajectory_notices(counts: Mapping[str, int]) -> tuple[str, ...]:
    """What the chat template and the choice of groups did to trajectories.

    Args:
        counts: Counts by the names of the report's fields, and `num_same_id`, rows of trajectories with an earlier id.
    """
    lines = []
    if counts["num_rewritten"]:
        lines.append(
            f"{counts['num_rewritten']} of {counts['num_trajectories']} trajectories are written in several token rows "
            f"({counts['num_earlier_parts']} more), since the history of a later turn is not what the model saw and "
            f"wrote at an earlier one; that takes {counts['rewritten_tokens']} tokens more than their last rows alone"
        )
    if counts["num_same_id"]:
        lines.append(
            f"{counts['num_same_id']} rows of trajectories have the id of an earlier row and are groups of their own; "
            "attempts that are to be compared belong into one row"
        )
    if counts["num_branches"] or counts["num_single"]:
        lines.append(
            f"turns make groups: {counts['num_branches']} histories have different answers; "
            f"{counts['num_single']} have one answer only and are left out"
        )
    if counts["num_pairs"] or counts["num_equal"]:
        lines.append(
            f"the loss compares two responses: of {counts['num_pairs']} groups of trajectories the best and the worst "
            f"one are taken; {counts['num_equal']} have no two different scores and are left out"
        )
    return tuple(lines)


def gathering_notices(counts: Mapping[str, int], group_by: str | None) -> tuple[str, ...]:
    """How rows of one response became groups.

    Args:
        counts: `num_single_rows`, and `num_gathered`, the groups that they became.
        group_by: The column that they were gathered by, or None for the prompt.
    """
    num_rows, num_groups = counts["num_single_rows"], counts["num_gathered"]
    if not num_rows:
        return ()
    by = "their prompt" if group_by is None else f"`{group_by}`"
    return (f"rows of one response were gathered by {by}: {_count(num_rows, 'row')}, {_count(num_groups, 'group')}",)


class Notes:
    """Counts, row by row, what notices are made from.

    Attributes:
        unread: Names of unread columns.
    """

    def __init__(self) -> None:
        self.unread: set[str] = set()
        self._prompt_columns: Counter[str] = Counter()
        self._conversions: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._contradiction = ""

    def add(self, location: str, row: PreferenceRow) -> None:
        """Count a row that became a group, or the rows that became one, of which the first is at the location."""
        self.unread.update(row.unread)
        if row.prompt_column is not None:
            self._prompt_columns[row.prompt_column] += row.num_rows
        for notice in row.notices:
            self._conversions[notice] += row.num_rows
        self._kinds["conversation" if isinstance(row.prompt, tuple) else "text"] += row.num_rows
        self._kinds["implicit"] += row.prompt is None
        self._kinds["asked"] += row.is_asked_by_user
        self._kinds["repeated"] += _repeats_prompt(row)
        if (same := row.contradiction()) is not None:
            self._kinds["contradiction"] += 1
            # Responses of rows of their own are named with their rows.
            place = "" if row.num_rows > 1 else f" of {location}"
            self._contradiction = self._contradiction or f"{' and '.join(same)}{place}"

    def lines(self) -> tuple[str, ...]:
        """The notices; the same for the same rows, whatever the source."""
        lines = []
        for name, count in sorted(self._prompt_columns.items()):
            beside = " (with `input` on a line of its own, where there is one)" if name == "instruction" else ""
            lines.append(f"`{name}`{beside} is taken as the prompt, since there is no `prompt` ({_rows(count)})")
        lines += [f"{notice} ({_rows(count)})" for notice, count in sorted(self._conversions.items())]
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
        if self._kinds["contradiction"]:
            lines.append(
                "a response stands twice in its group and is rated differently; keep the rating that is meant "
                f"({_count(self._kinds['contradiction'], 'group')}, such as {self._contradiction})"
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
    return _count(count, "row")


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
