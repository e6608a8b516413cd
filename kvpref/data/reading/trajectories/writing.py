"""Writes attempts as texts: each turn with the history that the model saw when it generated the turn.

A chat template may write a turn differently once others follow: without its thinking, or with a different end. So each
turn is written as the last of its conversation, where it was generated. If that text continues the text of the turn
before, both are scored in one text; if not, the turn begins a new text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kvpref.data.reading.lost_parts import check_nothing_lost, check_prompt_written
from kvpref.data.reading.messages import Message, RowError, TemplateRefusalError
from kvpref.data.reading.response_spans import ChatTemplate, Span, chat_template_of, find_spans
from kvpref.data.reading.roles import check_roles
from kvpref.data.reading.template_probes import TemplateProbes
from kvpref.data.reading.trajectories.attempts import Attempt, Turn
from kvpref.data.reading.trajectories.forms import forms_of, prints_objects
from kvpref.data.reading.trajectories.marks import find_marked, marks_generation
from kvpref.errors import InputError


@dataclass(frozen=True)
class WrittenTurn:
    """One turn as the last of its conversation.

    Args:
        text: The text of the conversation.
        spans: The scored characters of the turn; one run, unless the template marks several.
        goes_on: Whether `text` begins with the whole text of the turn before.
        question: The text that the model answered, if requested.
    """

    text: str
    spans: tuple[Span, ...]
    goes_on: bool
    question: str = ""


class AttemptWriter:
    """Writes attempts with one tokenizer's chat template.

    Args:
        given: A tokenizer, or a processor.
        probes: Cached knowledge of its template.
        with_questions: Whether to also write what each turn answers.
    """

    def __init__(self, given: Any, probes: TemplateProbes, *, with_questions: bool = False) -> None:
        self._template = chat_template_of(given)
        self._with_questions = with_questions
        self._probes = probes
        self._has_marks = bool(self._template.program) and marks_generation(self._template)

    def write(self, attempt: Attempt) -> tuple[WrittenTurn, ...]:
        """The texts of an attempt's turns.

        Raises:
            RowError: If the template refuses a message, or leaves out what one says; the error names the message.
            InputError: If the tokenizer has no chat template.
        """
        if not self._template.program:
            raise InputError(
                "the row holds chat messages, and the tokenizer has no chat template; use the tokenizer of a chat "
                "model, or set tokenizer.chat_template"
            )
        first_error: RowError | None = None
        for form in forms_of(attempt):
            try:
                return self._write(attempt, form)
            except RowError as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def _write(self, given: Attempt, attempt: Attempt) -> tuple[WrittenTurn, ...]:
        written: list[WrittenTurn] = []
        for turn in attempt.turns:
            try:
                written.append(self._write_turn(turn, written[-1] if written else None))
                if prints_objects(given, turn.message, written[-1].text):
                    raise RowError("the chat template writes a call's arguments as Python, not as JSON")
            except RowError as error:
                raise self._named(error, turn) from error
        if self._has_marks:
            written = self._with_marks(attempt, written)
        self._check(attempt, written)
        return tuple(written)

    def _template_of(self, turn: Turn) -> ChatTemplate:
        template = replace(
            self._template,
            settings=dict(turn.settings),
            reads_parts_only=self._probes.reads_parts_only(self._template),
        )
        self._probes.check_settings(template)
        return template

    def _write_turn(self, turn: Turn, before: WrittenTurn | None) -> WrittenTurn:
        template = self._template_of(turn)
        check_roles(template, turn.history, "the conversation")
        if self._has_marks:
            text = template.write((*turn.history, turn.message))
            spans: tuple[Span, ...] = ((0, len(text)),)
        else:
            (text,), (spans,) = find_spans(template, turn.history, ((turn.message,),), (turn.name,))
        goes_on = before is not None and len(text) > len(before.text) and text.startswith(before.text)
        question = template.write(turn.history, add_generation_prompt=True) if self._with_questions else ""
        return WrittenTurn(text, spans, goes_on, question)

    def _with_marks(self, attempt: Attempt, written: list[WrittenTurn]) -> list[WrittenTurn]:
        """The turns with the template's marks, read once per text that several turns share."""
        found: list[WrittenTurn] = []
        marked: tuple[Span, ...] = ()
        for index, (turn, own) in enumerate(zip(attempt.turns, written, strict=True)):
            if not own.goes_on:
                stop = next((n for n in range(index + 1, len(written)) if not written[n].goes_on), len(written))
                last = attempt.turns[stop - 1]
                messages = (*last.history, last.message)
                marked = find_marked(self._template_of(last), messages, written[stop - 1].text)
                begin, earlier = self._find_begin(turn, own.text), 0
            spans = tuple((max(start, earlier), min(end, len(own.text))) for start, end in marked if end > begin)
            spans = tuple(span for span in spans if span[0] < span[1])
            if not spans:
                raise RowError(
                    f"{turn.name}: the chat template marks nothing of the turn as generated; let its "
                    "{% generation %} block hold every assistant turn, or leave the marks out",
                    turn.location,
                )
            found.append(replace(own, spans=spans))
            begin = earlier = len(own.text)
        return found

    def _find_begin(self, turn: Turn, text: str) -> int:
        """A position after everything marked in a turn's history and before the end of the turn."""
        template = self._template_of(turn)
        for is_asked in (False, True):
            try:
                before = template.write(turn.history, add_generation_prompt=is_asked)
            except RowError:
                continue
            if text.startswith(before):
                return len(before)
        raise RowError(
            f"{turn.name}: the chat template writes the text before the turn differently once the turn follows; use a "
            "template that writes the same before and after",
            turn.location,
        )

    def _check(self, attempt: Attempt, written: list[WrittenTurn]) -> None:
        """Refuse a template that leaves out a part of a message."""
        is_rewritten = not all(own.goes_on for own in written[1:])
        known: tuple[Message, ...] = ()
        for turn, own in zip(attempt.turns, written, strict=True):
            template = self._template_of(turn)
            try:
                span = (own.spans[0][0], own.spans[-1][1])
                check_nothing_lost((turn.message,), own.text, (span,), "the message")
                # If nothing is rewritten, the last text contains all the others.
                if is_rewritten or turn is attempt.turns[-1]:
                    is_longer = turn.history[: len(known)] == known
                    first = len(known) if is_rewritten and is_longer else 0
                    tools = template.settings.get("tools", ())
                    check_prompt_written(turn.history, tools, own.text, first=first)
                    self._probes.check_written(template, turn.history, (turn.message,), "the message", first=first)
            except RowError as error:
                raise self._named(error, turn) from error
            known = (*turn.history, turn.message)

    def _named(self, error: RowError, turn: Turn) -> RowError:
        """The error with the turn it is about; if the template refuses, with the message that it refuses."""
        if not isinstance(error, TemplateRefusalError):
            return RowError(f"{turn.name}: {error}", turn.location)
        messages = (*turn.history, turn.message)
        template = self._template_of(turn)
        number = len(messages) - 1
        while number and not _writes(template, messages[:number]):
            number -= 1
        if not number:
            return RowError(f"{turn.name}: {error}", turn.location)
        stumbles = messages[number]
        what = f"message {number + 1} of {len(messages)}, of role {stumbles['role']!r}"
        return RowError(f"{turn.name}: {error}; the first message that it refuses is {what}", turn.location)


def _writes(template: ChatTemplate, messages: tuple[Message, ...]) -> bool:
    try:
        template.write(messages)
    except RowError:
        return False
    return True
