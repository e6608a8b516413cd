"""``kvpref data tree``: the prefix tree of one row, as text and as a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kvpref.atomic_files import check_writable
from kvpref.cli.given_data import GivenData
from kvpref.cli.options import (
    COLUMN,
    DATA,
    GROUP_BY,
    MAX_IMAGE_PIXELS,
    MAX_PROMPT_TOKENS,
    MAX_RESPONSE_TOKENS,
    MODEL_PANEL,
    ON_BAD_ROW,
    SPLIT,
)
from kvpref.data.dataset import OnBadRow
from kvpref.errors import InputError

MAX_IDS_SHOWN = 5


def tree(
    data: Annotated[list[str], DATA],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub name.", rich_help_panel=MODEL_PANEL)],
    split: Annotated[str | None, SPLIT] = None,
    column: Annotated[list[str] | None, COLUMN] = None,
    group_by: Annotated[str | None, GROUP_BY] = None,
    id: Annotated[
        str | None, typer.Option(help="Which row: its id, file:line, or line.", show_default="the first")
    ] = None,
    output: Annotated[Path, typer.Option(help="The picture: .svg, .png or .pdf.")] = Path("tree.svg"),
    max_prompt_tokens: Annotated[int | None, MAX_PROMPT_TOKENS] = None,
    max_response_tokens: Annotated[int | None, MAX_RESPONSE_TOKENS] = None,
    max_image_pixels: Annotated[int | None, MAX_IMAGE_PIXELS] = None,
    on_bad_row: Annotated[OnBadRow, ON_BAD_ROW] = "stop",
) -> None:
    """Print and draw how the responses to a prompt, or the attempts at a task, share their beginnings."""
    from rich.console import Console

    from kvpref.data import DataOptions, load_processor
    from kvpref.data.tree_picture.drawing import check_picture, draw_tree
    from kvpref.data.tree_picture.group_tree import GroupTree
    from kvpref.data.tree_picture.text import text_lines

    given = GivenData.of(data, split=split, column=column, group_by=group_by)
    check_picture(output)
    check_writable(output)
    options = DataOptions(
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        max_image_pixels=max_image_pixels,
        on_bad_row=on_bad_row,
    )
    with Console(stderr=True).status(f"reading {given}"):
        dataset = given.load(load_processor(tokenizer), options)
    index = 0 if id is None else find_row(dataset.group_ids, id)
    found = GroupTree.of(dataset[index])
    console = Console()
    for line in text_lines(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    draw_tree(found, output)
    console.print(f"written: {output}", markup=False, highlight=False, soft_wrap=True)


def find_row(ids: Sequence[str | None], wanted: str) -> int:
    """The row that is meant.

    Args:
        ids: Of all groups: ``file:line`` or ``file:row N``, with the data's own id in parentheses if it has one.
        wanted: The data's own id; or the place, with or without the file's folders; or the line or row alone.

    Returns:
        Its index.

    Raises:
        InputError: If there is none, or there are several.
    """
    from kvpref.data.tree_picture.group_tree import split_id

    places = [split_id(id or "") for id in ids]
    ways = (
        [task for _, task in places],
        [place for place, _ in places],
        [Path(place).name for place, _ in places],
        [_number(place) for place, _ in places],
    )
    for names in ways:
        found = [index for index, name in enumerate(names) if name == wanted]
        if len(found) > 1:
            several = ", ".join(places[index][0] for index in found[:MAX_IDS_SHOWN])
            raise InputError(f"--id {wanted}: there are {len(found)} such rows; give one of their places: {several}")
        if found:
            return found[0]
    known = [task or Path(place).name for place, task in places]
    more = f" and {len(known) - MAX_IDS_SHOWN} more" if len(known) > MAX_IDS_SHOWN else ""
    raise InputError(f"--id {wanted}: there is no such row; there are {', '.join(known[:MAX_IDS_SHOWN])}{more}")


def _number(place: str) -> str:
    found = re.search(r"\d+$", place)
    return found[0] if found else ""
