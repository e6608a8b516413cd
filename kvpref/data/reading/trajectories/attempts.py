"""The attempts at a task, whatever form of row they come from: the assistant's turns, each with its history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvpref.data.reading.messages import Message

TrajectoryGroups = Literal["task", "turn"]
"""What forms a group: the attempts at a task, or the answers that attempts give to one history."""

TURN_SCORES = "turn_scores"
"""The column of scores by turn: per response a list with a number for each of its turns."""


TOKEN_WEIGHTS = "token_weights"
"""The column of token weights: per response a number, or a list with one per turn or per scored token."""


@dataclass(frozen=True)
class Turn:
    """One scored turn of the assistant.

    Args:
        history: The messages before it, at least one.
        message: The turn's message.
        name: Its name in errors.
        settings: Keyword arguments for the chat template, such as ``tools``.
        location: The location of its row, if a row is one model call.
    """

    history: tuple[Message, ...]
    message: Message
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    location: str | None = None


@dataclass(frozen=True)
class Attempt:
    """One response to a task.

    Args:
        turns: Its turns in order, at least one.
        name: Its name in errors.
        score: The score of the whole attempt; None if unrated.
        turn_scores: One per turn, or None.
        columns: Its own values of extra columns: a number, one per turn, one per scored token, or anything else.
    """

    turns: tuple[Turn, ...]
    name: str
    score: float | None = None
    turn_scores: tuple[float, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """The attempts at one task.

    Args:
        attempts: The attempts, at least one.
        id: Its id in the data, or None.
        columns: The extra columns of the task.
        unread: Names of fields that are not read.
    """

    attempts: tuple[Attempt, ...]
    id: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def group_id(self, location: str) -> str:
        """The id of the group: its location, and the task's id."""
        return location if self.id is None else f"{location} ({self.id})"
