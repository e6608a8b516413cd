"""Rows of whole trajectories: ``{"id", "trajectories": [{"messages", "score"}, ...], "tools"}``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as AbstractSequence
from typing import Any

from kvpref.data.reading.columns import find_system, refuse_media, template_settings, without_nulls
from kvpref.data.reading.images.parts import find_images
from kvpref.data.reading.messages import Message, RowError, image_parts, parse_messages, type_name
from kvpref.data.reading.numbers import check_finite, parse_number
from kvpref.data.reading.prompts import with_system
from kvpref.data.reading.trajectories.attempts import TOKEN_WEIGHTS, TURN_SCORES, Attempt, Task, Turn

EXPECTED_TRAJECTORIES = "{id, trajectories: [{messages, score}, ...]}, optionally with tools"

_ROW_FIELDS = {"id", "trajectories", "system", "tools", "chat_template_kwargs"}
_OWN_FIELDS = {"messages", "score", TURN_SCORES, "tools", "chat_template_kwargs"}
_OTHER_SHAPES = ("prompt", "chosen", "rejected", "responses", "messages", "response")
_RATINGS = ("score", "scores", "ranks", TURN_SCORES)


def has_trajectories(value: object) -> bool:
    """Whether a decoded row is of this form, right or wrong."""
    return isinstance(value, dict) and value.get("trajectories") is not None


def parse_trajectories(value: Mapping[str, Any], columns: AbstractSequence[str] = ()) -> Task:
    """Check one decoded row of trajectories.

    Args:
        value: The decoded row.
        columns: Extra fields to keep, of the row (a list with one entry per trajectory is per trajectory) or of each
            trajectory.

    Raises:
        RowError: If the row has the wrong form, a trajectory has no assistant turn, or a column is missing.
    """
    row = without_nulls(dict(value))
    others = [name for name in _OTHER_SHAPES if name in row]
    if others:
        raise RowError(f"found both `trajectories` and `{others[0]}`; expected {EXPECTED_TRAJECTORIES}")
    ratings = [name for name in _RATINGS if name in row]
    if ratings:
        raise RowError(f"found `{ratings[0]}` beside `trajectories`; give each trajectory its own `score`, inside it")
    refuse_pictures(row)
    items = row["trajectories"]
    if not isinstance(items, list):
        raise RowError(f"`trajectories` must be a list, found {type_name(items)}; expected {EXPECTED_TRAJECTORIES}")
    if not items:
        raise RowError("`trajectories` is empty; expected at least one")
    attempts = tuple(_parse_attempt(item, f"trajectories[{index}]", row) for index, item in enumerate(items))
    check_all_or_none(TURN_SCORES, [attempt.name for attempt in attempts if attempt.turn_scores is None], attempts)
    shared, own = _split_columns(row, items, [name for name in columns if name != TURN_SCORES])
    if TURN_SCORES in columns and attempts[0].turn_scores is None:
        raise missing_column(TURN_SCORES, row)
    attempts = tuple(
        Attempt(attempt.turns, attempt.name, attempt.score, attempt.turn_scores, values)
        for attempt, values in zip(attempts, own, strict=True)
    )
    read = {*_ROW_FIELDS, *columns}
    unread = [str(name) for name in row if name not in read]
    unread += [f"trajectories.{name}" for item in items for name in item if name not in {*_OWN_FIELDS, *columns}]
    return Task(attempts, parse_id(row), shared, tuple(dict.fromkeys(unread)))


def parse_id(row: Mapping[str, Any]) -> str | None:
    """The id of the row's task, or None.

    Raises:
        RowError: If it is neither a string nor an integer.
    """
    found = row.get("id")
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise RowError(f"`id` must be a string or an integer, found {type_name(found)}")
    return str(found)


def refuse_pictures(row: Mapping[str, Any]) -> None:
    """Raise RowError if the row has images, video or audio."""
    refuse_media(row)
    if find_images(row):
        raise RowError("images in trajectories are not supported; leave them out to train on the text alone")


def parse_conversation(value: object, name: str, system: str | None) -> tuple[Message, ...]:
    """The messages of a conversation, preceded by the row's system message.

    Raises:
        RowError: If it is not a list of messages, or holds images.
    """
    if not isinstance(value, list):
        raise RowError(f"`{name}` must be a list of messages, found {type_name(value)}")
    messages = parse_messages(value, name)
    for index, message in enumerate(messages):
        if image_parts(message):
            raise RowError(f"`{name}[{index}]` holds an image, and images in trajectories are not supported")
    return with_system(messages, system)


def turns_of(
    messages: tuple[Message, ...], name: str, settings: Mapping[str, Any], begin: int = 0, location: str | None = None
) -> tuple[Turn, ...]:
    """The assistant's turns in a conversation, each with its history.

    Args:
        messages: The conversation.
        name: The name of its list of messages in errors.
        settings: Settings of the chat template.
        begin: Turns before this message are only history.
        location: The location of its row, if that is one model call.

    Raises:
        RowError: If there is none, or the first message is one.
    """
    found = [index for index in range(begin, len(messages)) if messages[index]["role"] == "assistant"]
    if not found:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages[begin:]))
        raise RowError(f"`{name}` has no turn of role 'assistant', so there is nothing to score; found roles: {roles}")
    if found[0] == 0:
        raise RowError(
            f"`{name}` begins with an assistant turn, which answers nothing; put a system or user message before it"
        )
    return tuple(
        Turn(messages[:index], messages[index], f"`{name}[{index - begin}]`", settings, location) for index in found
    )


def check_all_or_none(name: str, lacking: AbstractSequence[str], all_of: AbstractSequence[object]) -> None:
    """Raise RowError if some have a field and others lack it."""
    if lacking and len(lacking) < len(all_of):
        raise RowError(f"{lacking[0]} has no `{name}`, and others have; give it to all or to none")


def missing_column(name: str, row: Iterable[object]) -> RowError:
    """The error for a column that the loss reads."""
    return RowError(f"missing column `{name}`, which the loss reads; found {', '.join(map(str, row)) or 'none'}")


def _parse_attempt(item: object, name: str, row: Mapping[str, Any]) -> Attempt:
    if not isinstance(item, dict):
        raise RowError(f"`{name}` must be an object with `messages`, found {type_name(item)}")
    if "messages" not in item:
        found = ", ".join(map(str, item)) or "none"
        raise RowError(f"`{name}` has no `messages`; expected {EXPECTED_TRAJECTORIES}, found {found}")
    # A trajectory's tools and settings override the row's.
    settings = template_settings({**row, **{key: item[key] for key in _OWN_FIELDS & set(item)}})
    messages = parse_conversation(item["messages"], f"{name}.messages", find_system(row))
    offset = len(messages) - len(item["messages"])
    turns = turns_of(messages, f"{name}.messages", settings)
    if offset:
        turns = tuple(
            Turn(turn.history, turn.message, f"`{name}.messages[{len(turn.history) - offset}]`", settings)
            for turn in turns
        )
    score = item.get("score")
    return Attempt(
        turns,
        f"`{name}`",
        None if score is None else parse_number(score, f"{name}.score"),
        _parse_turn_scores(item.get(TURN_SCORES), f"{name}.{TURN_SCORES}", len(turns)),
    )


def _parse_turn_scores(value: object, name: str, num_turns: int) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise RowError(f"`{name}` must be a list with one number per assistant turn, found {type_name(value)}")
    if len(value) != num_turns:
        raise RowError(f"`{name}` has {len(value)} entries for {num_turns} assistant turns; expected one per turn")
    return tuple(parse_number(item, f"{name}[{index}]", may_be_null=False) for index, item in enumerate(value))


def _split_columns(
    row: Mapping[str, Any], items: AbstractSequence[Mapping[str, Any]], columns: AbstractSequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The columns of the task, and those of each trajectory."""
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in items]
    for name in columns:
        lacking = [f"`trajectories[{index}]`" for index, item in enumerate(items) if name not in item]
        if name in row and len(lacking) < len(items):
            raise RowError(f"found column `{name}` both in the row and in its trajectories; keep one of the two")
        if name not in row and len(lacking) == len(items):
            raise missing_column(name, row)
        check_all_or_none(name, lacking if name not in row else [], items)
        values = row.get(name)
        check_finite(values, name)
        for index, item in enumerate(items):
            check_finite(item.get(name), f"trajectories[{index}].{name}")
        if name in row and not (isinstance(values, list) and len(values) == len(items)):
            if name == TOKEN_WEIGHTS:
                raise RowError(f"`{name}` must be a list with one entry for each of the {len(items)} trajectories")
            shared[name] = values
            continue
        for index, item in enumerate(items):
            own[index][name] = item[name] if values is None else values[index]
    return shared, own
