"""A group with the runs of its prefix tree, and the labels of its sequences."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kvpref.data.tree_picture.runs import Run, find_runs
from kvpref.plan.batch import Batch, collate
from kvpref.plan.sharing import DEFAULT_MIN_SHARED_TOKENS
from kvpref.records.groups import Group, Sequence

MAX_NAME_CHARS = 40
MAX_NAMES = 2
"""Most sequences named where they end in one place; further ones are counted."""


@dataclass(frozen=True, eq=False)
class GroupTree:
    """The content of a group's picture.

    Args:
        group: The group.
        batch: A batch of this group alone.
        runs: The runs of the batch's tree, over its parts.
    """

    group: Group
    batch: Batch
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, group: Group, *, min_shared_tokens: int = DEFAULT_MIN_SHARED_TOKENS) -> GroupTree:
        """The tree of a group as used in training on this group alone.

        Raises:
            ValueError: As `kvpref.collate`.
        """
        batch = collate([group], min_shared_tokens=min_shared_tokens)
        return cls(group, batch, find_runs(batch.tree, batch.parts))

    @cached_property
    def noun(self) -> str:
        """The word for a response: an attempt, if any has several turns."""
        several = any(len(part.turns) > 1 or response.earlier for response in self.responses for part in response.parts)
        return "attempt" if several else "response"

    @property
    def scored_name(self) -> str:
        """The word for scored tokens."""
        return "assistant turns" if self.noun == "attempt" else "responses"

    @property
    def responses(self) -> tuple[Sequence, ...]:
        return self.group.sequences

    @property
    def name(self) -> str:
        """The group's id in the data, or its file and line without folders."""
        place, task = split_id(self.group.id or "group")
        name = task or Path(place).name
        return name if len(name) <= MAX_NAME_CHARS else f"{name[: MAX_NAME_CHARS - 1]}…"

    @property
    def title(self) -> str:
        """Name and number of responses."""
        count = len(self.responses)
        return f"{self.name}: {count} {self.noun}{'' if count == 1 else 's'}"

    @property
    def facts(self) -> str:
        """Tokens, what sharing saves, and passes."""
        total, unique, levels = self.batch.num_total_tokens, self.batch.num_unique_tokens, self.batch.tree.num_levels
        return (
            f"{total:,} tokens, {unique:,} unique: data saving {total / unique:.2f}x; "
            f"{levels} pass{'' if levels == 1 else 'es'}; {self.batch.num_scored_tokens:,} tokens scored"
        )

    @cached_property
    def _owners(self) -> list[tuple[int, bool]]:
        """For each part, its response, and whether it is the response's last part."""
        return [(number, part is response) for number, response in enumerate(self.responses) for part in response.parts]

    def label(self, parts: tuple[int, ...]) -> str:
        """The label of parts that end in one place, with their scores.

        Whole responses come before parts that hold earlier turns of others.
        """
        ordered = sorted(parts, key=lambda part: not self._owners[part][1])
        names = [self._label(part) for part in ordered[:MAX_NAMES]]
        if len(parts) > MAX_NAMES:
            names.append(f"{len(parts) - MAX_NAMES} more")
        return "; ".join(names)

    def numbers(self, parts: tuple[int, ...]) -> str:
        """The numbers of their responses, counted from 1."""
        found = [str(number + 1) for number in dict.fromkeys(self._owners[part][0] for part in parts)]
        more = [f"{len(found) - MAX_NAMES} more"] if len(found) > MAX_NAMES else []
        return ", ".join([*found[:MAX_NAMES], *more])

    def _label(self, part: int) -> str:
        number, is_last = self._owners[part]
        if not is_last:
            return f"{self.noun} {number + 1}, earlier turns"
        words = [f"{self.noun} {number + 1}", self._quality(number)]
        num_turns = sum(len(own.turns) for own in self.responses[number].parts)
        if self.noun == "attempt":
            words.append(f"{num_turns} turn{'' if num_turns == 1 else 's'}")
        return ", ".join(word for word in words if word)

    def _quality(self, number: int) -> str:
        group = self.group
        if group.ranks is not None:
            rank = group.ranks[number]
            return "unranked" if rank is None else f"rank {rank:g}"
        if group.scores is not None:
            score = group.scores[number]
            return "unrated" if score is None else f"score {score:.4g}"
        if group.labels is not None:
            return "chosen" if group.labels[number] else "rejected"
        return ""


def split_id(id: str) -> tuple[str, str]:
    """A group's source (``file:line``, ``file:row N``), and its id in the data or an empty string."""
    found = re.fullmatch(r"(.*?(?::|row )\d+) \((.*)\)", id, flags=re.DOTALL)
    return (found[1], found[2]) if found else (id, "")
