"""Writes docs/command_line.md from the commands' own help: python docs/hooks/command_line_page.py"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import typer

from kvpref.cli.app import app

PAGE = Path(__file__).resolve().parents[1] / "command_line.md"
HEAD = """\
# Command line

What `--help` says, for all commands. `docs/hooks/command_line_page.py` writes this page.

Exit codes: 0 ok; 1 a run that failed; 2 bad usage or bad input, with its file and line; 130 stopped by Ctrl-C.
Results go to stdout, progress and warnings to stderr; with `--json`, the last line of stdout is one JSON object.
"""


def render() -> str:
    """The page's text."""
    root = typer.main.get_command(app)
    parts = [HEAD]
    for words, command in _commands(root, ["kvpref"]):
        parts.append(f"\n{'#' * len(words)} `{' '.join(words)}`\n")
        if not hasattr(command, "commands"):
            parts.append(f"\n```text\n{_usage(words, command)}\n```\n")
        parts.append(f"\n{_about(command.help or '')}\n")
        if not hasattr(command, "commands"):
            parts += _tables(command.params)
    return "".join(parts)


def _commands(group: Any, words: list[str]) -> Iterator[tuple[list[str], Any]]:
    """Every command with the words that call it, depth first, in the order of the app."""
    for name, command in group.commands.items():
        yield [*words, name], command
        if hasattr(command, "commands"):
            yield from _commands(command, [*words, name])


def _about(text: str) -> str:
    """A help text as Markdown: its examples are commands."""
    paragraphs = [paragraph.strip() for paragraph in text.replace("\b\n", "").split("\n\n")]
    return "\n\n".join(
        re.sub(r"^Examples?:\s+(.*)$", lambda found: f"```bash\n{found[1]}\n```", _escaped(paragraph), flags=re.DOTALL)
        for paragraph in paragraphs
        if paragraph
    )


def _usage(words: list[str], command: Any) -> str:
    arguments = [
        _name(item) if item.required else f"[{_name(item)}]"
        for item in command.params
        if item.param_type_name == "argument"
    ]
    return " ".join([*words, *arguments, "[OPTIONS]"])


def _tables(params: list[Any]) -> Iterator[str]:
    """The arguments, then the options by the panels of the help."""
    panels: dict[str, list[Any]] = {}
    for item in params:
        if not item.hidden:
            kind = item.param_type_name
            panels.setdefault(kind if kind == "argument" else item.rich_help_panel or "option", []).append(item)
    for panel, items in sorted(panels.items(), key=lambda pair: pair[0] != "argument"):
        rows = "".join(_row(item, item.param_type_name) for item in items)
        yield f"\n| {panel} | what | default |\n| --- | --- | --- |\n{rows}"


def _row(item: Any, kind: str) -> str:
    default = item.show_default if isinstance(item.show_default, str) else item.default
    if item.required:
        default = "required"
    elif kind == "option" and item.is_flag and not isinstance(item.show_default, str):
        default = "off" if not item.default else "on"
    elif default is None or callable(default):
        default = ""
    return f"| `{_name(item)}` | {_cell(item.help or '')} | {_cell(str(default))} |\n"


def _name(item: Any) -> str:
    if item.param_type_name == "argument":
        return str(item.metavar or item.name).upper()
    names = "`, `".join([*item.opts, *item.secondary_opts])
    if item.is_flag:
        return names
    return f"{names} {item.metavar or _value(item.type_descriptor.annotation)}" + (" ..." if item.multiple else "")


def _value(annotation: Any) -> str:
    """What stands for a value of a type."""
    names = {int: "N", float: "X", Path: "PATH"}
    return next((names[kind] for kind in (annotation, *get_args(annotation)) if kind in names), "TEXT")


def _cell(text: str) -> str:
    return " ".join(_escaped(text).replace("|", "\\|").split())


def _escaped(text: str) -> str:
    """Without rich's marks, and with nothing that Markdown takes for a tag."""
    return re.sub(r"<(?=\w)", "&lt;", text)


if __name__ == "__main__":
    PAGE.write_text(render())
