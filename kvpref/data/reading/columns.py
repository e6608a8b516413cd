"""The columns of a row that are read, and the meaning of those other than prompt and responses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from kvpref.data.reading.json_text import decode_json
from kvpref.data.reading.messages import RowError, type_name

PROMPT_COLUMNS = ("question", "query", "instruction", "prompts")
"""Columns taken as the prompt if there is no `prompt`; an `input` beside `instruction` is a part of it, and an `input`
without any of these is the prompt."""

IMAGE_COLUMNS = ("image", "images")
"""Columns of images in the prompt."""

_LIKE_IMAGES = frozenset(
    f"{kind}{part}{number}"
    for kind in ("image", "img", "picture", "photo")
    for part in ("", "_path", "_file", "_url", "_bytes")
    for number in ("", "s")
) - set(IMAGE_COLUMNS)
"""Names of image columns in other tools."""

MEDIA_COLUMNS = ("video", "videos", "audio", "audios")
"""Columns of video and audio, which are refused until they are supported."""

SHAPE_COLUMNS = ("prompt", "chosen", "rejected", "responses", "scores", "ranks")
"""The columns of kvpref's own rows."""

TRAJECTORY_COLUMNS = ("trajectories", "messages", "response", "id", "attempt", "score")
"""The columns of rows of trajectories and of model calls."""

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
"""A conversation: OpenAI's name, ShareGPT's, and that of ms-swift's rows of rounds."""

OTHER_SHAPE_COLUMNS = (
    *CONVERSATION_COLUMNS[1:],
    *("completion", "output", "text", "label", "kto_tag", "reward", "rating"),
    *("completions", "generations", "answers", "rewards", "ratings"),
    *("chosen_response", "rejected_response", "rejected_messages", "history"),
    *("score_chosen", "score_rejected", "chosen_score", "rejected_score", "chosen_rating", "rejected_rating"),
    *("chosen-rating", "rejected-rating", "chosen_reward", "rejected_reward"),
)
"""The columns of other tools' rows, which `kvpref.data.reading.shapes` reads."""

ROW_FIELDS = (
    *SHAPE_COLUMNS,
    *TRAJECTORY_COLUMNS,
    *OTHER_SHAPE_COLUMNS,
    *PROMPT_COLUMNS,
    "input",
    "system",
    "tools",
    "chat_template_kwargs",
    *IMAGE_COLUMNS,
    *MEDIA_COLUMNS,
    "token_weights",
)
"""All columns that are read, apart from extra ones requested by name."""

_SET_BY_US = (
    "add_generation_prompt",
    "add_special_tokens",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)
"""Arguments of `apply_chat_template` that data may not set, like everything that begins with ``return_``."""


class PromptColumn(NamedTuple):
    """The prompt of a row, unchanged.

    Attributes:
        value: A text or messages, not yet checked; None if the row has none.
        name: The column that it comes from.
        read: All columns that it is made from.
    """

    value: Any = None
    name: str = "prompt"
    read: tuple[str, ...] = ()


def without_nulls(value: Any) -> Any:
    """The value without object keys that hold null, at any depth; items of lists stay.

    In tables every object has the keys of all rows, with null for missing ones, and chat templates react to the mere
    presence of a key. JSON is brought to the same form, so that both mean the same. Tuples become lists.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def find_prompt(row: Mapping[str, Any]) -> PromptColumn:
    """The prompt, from its own column or one that stands in for it.

    Raises:
        RowError: If several columns might be the prompt, or `instruction` and `input` cannot be joined.
    """
    if "prompt" in row:
        return PromptColumn(row["prompt"], "prompt", ("prompt",))
    found = [name for name in PROMPT_COLUMNS if name in row]
    if not found:
        # As in axolotl's `icr` rows; conversations already begin with their prompt.
        is_prompt = row.get("input") and not isinstance(row.get("chosen"), list)
        return PromptColumn(row["input"], "input", ("input",)) if is_prompt else PromptColumn()
    if len(found) > 1:
        names = " and ".join(f"`{name}`" for name in found)
        raise RowError(f"found {names} and no `prompt`; rename the one that is the prompt to `prompt`")
    (name,) = found
    if name != "instruction" or "input" not in row:
        return PromptColumn(row[name], name, (name,))
    if not isinstance(row["input"], str):
        raise RowError(f"`input` must be a string, found {type_name(row['input'])}")
    if not row["input"]:
        return PromptColumn(row[name], name, (name, "input"))
    if not isinstance(row[name], str):
        raise RowError(f"`instruction` must be a string beside `input`, found {type_name(row[name])}")
    return PromptColumn(f"{row[name]}\n{row['input']}", name, (name, "input"))


def find_system(row: Mapping[str, Any]) -> str | None:
    """The text of the system message, which may be empty; None if the row has none.

    Raises:
        RowError: If it is not a text.
    """
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise RowError(f"`system` must be a string, found {type_name(system)}")
    return system


def template_settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the chat template other than messages. Empty `tools` or settings count as none.

    Raises:
        RowError: If they have a wrong form, or settings name an argument that data may not set.
    """
    settings = _decoded(row.get("chat_template_kwargs"), "chat_template_kwargs", "an object") or {}
    if not isinstance(settings, dict):
        raise RowError(f"`chat_template_kwargs` must be an object, found {type_name(settings)}")
    for name in settings:
        if name == "tools":
            raise RowError("`chat_template_kwargs` holds `tools`; give them as the column `tools`")
        if name in _SET_BY_US or name.startswith("return_"):
            raise RowError(f"`chat_template_kwargs` holds `{name}`, which data may not set; leave it out")
    tools = _decoded(row.get("tools"), "tools", "a list of objects") or []
    if not isinstance(tools, list):
        raise RowError(f"`tools` must be a list of objects, found {type_name(tools)}")
    tools = [_decoded(tool, f"tools[{index}]", "an object") for index, tool in enumerate(tools)]
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise RowError(f"`tools[{index}]` must be an object, found {type_name(tool)}")
    return {**settings, "tools": tools} if tools else dict(settings)


def refuse_media(row: Mapping[str, Any]) -> None:
    """Raise RowError if the row has video or audio."""
    for name in MEDIA_COLUMNS:
        value = row.get(name)
        empty = value is None or (isinstance(value, str | list | dict) and not value)
        if not empty:
            raise RowError(
                f"`{name}` is not empty, and video and audio are not supported; leave such rows out, or drop the "
                "column to train without"
            )


def refuse_misnamed_images(unread: Iterable[str]) -> None:
    """Raise RowError if an unread column seems to hold the images of a row that has none."""
    for name in unread:
        if name.lower() in _LIKE_IMAGES or (name.lower() in IMAGE_COLUMNS and name not in IMAGE_COLUMNS):
            raise RowError(
                f"`{name}` is not read, and the row has no images; rename it to `images` if it holds them, or drop it"
            )


def _decoded(value: Any, name: str, expected: str) -> Any:
    """The value; a string is decoded as JSON, since tables handle objects of many forms badly."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return without_nulls(decode_json(value))
    except (ValueError, RecursionError) as error:
        raise RowError(f"`{name}` is a string that is not valid JSON ({error}); give {expected}") from error
