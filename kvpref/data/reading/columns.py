"""The columns of a row that are read, and what the ones beside prompt and responses mean."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from kvpref.data.reading.messages import RowError, type_name

PROMPT_COLUMNS = ("question", "query", "instruction", "prompts")
"""What is taken as the prompt where there is no `prompt`; an `input` beside `instruction` is a part of it."""

IMAGE_COLUMNS = ("image", "images")
"""What a model sees with the prompt."""

_LIKE_IMAGES = frozenset(
    f"{kind}{part}{number}"
    for kind in ("image", "img", "picture", "photo")
    for part in ("", "_path", "_file", "_url", "_bytes")
    for number in ("", "s")
) - set(IMAGE_COLUMNS)
"""Names that images go by elsewhere."""

MEDIA_COLUMNS = ("video", "videos", "audio", "audios")
"""What a model would have to see or hear, which is refused until it can."""

SHAPE_COLUMNS = ("prompt", "chosen", "rejected", "responses", "scores", "ranks")
"""What the shapes of rows are made of."""

ROW_FIELDS = (
    *SHAPE_COLUMNS,
    *PROMPT_COLUMNS,
    "input",
    "system",
    "tools",
    "chat_template_kwargs",
    *IMAGE_COLUMNS,
    *MEDIA_COLUMNS,
)
"""The columns that are read, besides extra ones that are asked for by name."""

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
"""Arguments of `apply_chat_template` that are no business of the data; so is all that begins with ``return_``."""


class PromptColumn(NamedTuple):
    """The prompt of a row as it stands.

    Attributes:
        value: A text or messages, not yet checked; None where the row has none.
        name: The column that it comes from.
        read: All columns that it is made of.
    """

    value: Any = None
    name: str = "prompt"
    read: tuple[str, ...] = ()


def without_nulls(value: Any) -> Any:
    """The value without the keys of objects that hold null, at any depth; items of lists stay.

    Tables give every object the keys that any other row has, with null for those that a row lacks, and chat templates
    take a key for a statement. JSON is brought to the same form, so that both mean the same. Tuples become lists.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def find_prompt(row: Mapping[str, Any]) -> PromptColumn:
    """The prompt, from its own column or one of those that stand for it.

    Raises:
        RowError: If several columns might be the prompt, or `instruction` and `input` cannot be put together.
    """
    if "prompt" in row:
        return PromptColumn(row["prompt"], "prompt", ("prompt",))
    found = [name for name in PROMPT_COLUMNS if name in row]
    if not found:
        return PromptColumn()
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
    """The text of the system message, which may be empty; None where the row says nothing of one.

    Raises:
        RowError: If it is no text.
    """
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise RowError(f"`system` must be a string, found {type_name(system)}")
    return system


def template_settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template is given besides the messages. Empty `tools` or settings count as none.

    Raises:
        RowError: If they have another form, or settings name what is not theirs.
    """
    settings = _decoded(row.get("chat_template_kwargs"), "chat_template_kwargs", "an object") or {}
    if not isinstance(settings, dict):
        raise RowError(f"`chat_template_kwargs` must be an object, found {type_name(settings)}")
    for name in settings:
        if name == "tools":
            raise RowError("`chat_template_kwargs` holds `tools`; give them as the column `tools`")
        if name in _SET_BY_US or name.startswith("return_"):
            raise RowError(f"`chat_template_kwargs` holds `{name}`, which is not up to the data; leave it out")
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
    """Raise RowError if one of the columns that nothing reads seems to hold the images of a row that has none."""
    for name in unread:
        if name.lower() in _LIKE_IMAGES or (name.lower() in IMAGE_COLUMNS and name not in IMAGE_COLUMNS):
            raise RowError(
                f"`{name}` is not read, and the row has no images; rename it to `images` if it holds them, or drop it"
            )


def _decoded(value: Any, name: str, expected: str) -> Any:
    """The value; a string is taken as its JSON, since tables have a hard time with objects of many forms."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return without_nulls(json.loads(value))
    except (ValueError, RecursionError) as error:
        raise RowError(f"`{name}` is a string that is not valid JSON ({error}); give {expected}") from error
