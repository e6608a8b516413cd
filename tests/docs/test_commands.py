"""Every `kvpref` command on a page has options, losses and settings that exist."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from markdown_pages import code_blocks, name_of, pages

from kvpref.cli.app import app
from kvpref.cli.command_line import read_words
from kvpref.cli.given_settings import parse_assignments
from kvpref.losses import make_loss
from kvpref.training import PreferenceTrainingArguments


def commands(path: Path) -> list[list[str]]:
    lines = [line for block in code_blocks(path, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [
        shlex.split(re.sub(r"^.*? -m kvpref ", "kvpref ", line), comments=True)[1:]
        for line in lines
        if re.match(r"kvpref |.* -m kvpref ", line)
    ]


FOUND = [pytest.param(words, id=f"{name_of(path)}: {' '.join(words)}") for path in pages() for words in commands(path)]


def test_there_are_some() -> None:
    assert len(FOUND) > 15


@pytest.mark.parametrize("words", FOUND)
def test_it_exists(words: list[str]) -> None:
    command, path = typer.main.get_command(app), []
    words = read_words(command, words)
    while hasattr(command, "commands"):
        path.append(words[len(path)])
        command = command.commands[path[-1]]
    # Parses, and refuses what the command does not have; runs nothing.
    given = command.make_context("kvpref", words[len(path) :]).params
    if path != ["train"]:
        return
    if given["loss"] is not None and ":" not in given["loss"]:
        make_loss(given["loss"], **parse_assignments(given["loss_arg"] or [], "--loss-arg"))
    known = {item.name for item in fields(PreferenceTrainingArguments)}
    assert parse_assignments(given["set_"] or [], "--set").keys() <= known
