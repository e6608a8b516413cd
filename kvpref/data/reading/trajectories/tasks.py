"""The texts of a task: those of its attempts, or of the places where its attempts diverge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvpref.data.reading.response_spans import Span
from kvpref.data.reading.trajectories.attempts import Attempt, Task, TrajectoryGroups
from kvpref.data.reading.trajectories.writing import AttemptWriter, WrittenTurn


class Member(NamedTuple):
    """A turn of an attempt, by their indices."""

    attempt: int
    turn: int


@dataclass
class Answer:
    """One of the answers to a history.

    Args:
        text: The text of history and answer.
        spans: The scored characters of the answer.
        members: The turns that give this answer, at least one.
    """

    text: str
    spans: tuple[Span, ...]
    members: list[Member] = field(default_factory=list)


@dataclass(frozen=True)
class RenderedTask:
    """The texts of one task.

    Args:
        task: The task.
        texts: All texts in order: for each attempt those in which its turns are scored, or for each branch its answers.
        spans: The scored characters of each text, in order.
        turns: If attempts form the group: per attempt and text, how many runs of scored characters each turn scored in
            the text has.
        branches: If answers form groups: the answers at each place where attempts diverge. None otherwise.
        num_single: If branches form groups: the number of histories with only one answer.
    """

    task: Task
    texts: tuple[str, ...]
    spans: tuple[tuple[Span, ...], ...]
    turns: tuple[tuple[tuple[int, ...], ...], ...] = ()
    branches: tuple[tuple[Answer, ...], ...] | None = None
    num_single: int = 0
    is_chat: bool = True
    images: tuple[Any, ...] = ()


def render_task(task: Task, writer: AttemptWriter, groups: TrajectoryGroups) -> RenderedTask:
    """Write a task's attempts.

    Args:
        task: The task to write.
        writer: Writes with a chat template.
        groups: What forms a group.

    Raises:
        RowError: As `AttemptWriter.write`.
        InputError: Likewise.
    """
    written = [writer.write(attempt) for attempt in task.attempts]
    if groups == "turn":
        return _render_branches(task, written)
    texts: list[str] = []
    spans: list[tuple[Span, ...]] = []
    turns = []
    for attempt in written:
        parts = _parts_of(attempt)
        texts += [part[-1].text for part in parts]
        spans += [tuple(span for turn in part for span in turn.spans) for part in parts]
        turns.append(tuple(tuple(len(turn.spans) for turn in part) for part in parts))
    return RenderedTask(task, tuple(texts), tuple(spans), tuple(turns))


def _parts_of(attempt: tuple[WrittenTurn, ...]) -> list[list[WrittenTurn]]:
    """The turns, grouped by the text in which they are scored."""
    parts: list[list[WrittenTurn]] = []
    for turn in attempt:
        if turn.goes_on:
            parts[-1].append(turn)
        else:
            parts.append([turn])
    return parts


def _render_branches(task: Task, written: list[tuple[WrittenTurn, ...]]) -> RenderedTask:
    places: dict[str, dict[str, Answer]] = {}
    for number, attempt in enumerate(written):
        for index, turn in enumerate(attempt):
            answers = places.setdefault(turn.question, {})
            answers.setdefault(turn.text, Answer(turn.text, turn.spans)).members.append(Member(number, index))
    branches = tuple(tuple(answers.values()) for answers in places.values() if len(answers) > 1)
    for together in branches:
        # All begin at the same place: a generation prompt may begin an answer in a way that some do not continue.
        start = min(answer.spans[0][0] for answer in together)
        for answer in together:
            answer.spans = ((start, answer.spans[0][1]), *answer.spans[1:])
    return RenderedTask(
        task,
        tuple(answer.text for answers in branches for answer in answers),
        tuple(answer.spans for answers in branches for answer in answers),
        branches=branches,
        num_single=len(places) - len(branches),
    )


def score_of(attempts: tuple[Attempt, ...], answer: Answer) -> float | None:
    """The mean, over the attempts that contain an answer, of that turn's score, or else of the attempt's.

    None if no such attempt has a score.
    """
    found = []
    for member in answer.members:
        attempt = attempts[member.attempt]
        score = attempt.score if attempt.turn_scores is None else attempt.turn_scores[member.turn]
        if score is not None:
            found.append(score)
    return sum(found) / len(found) if found else None
