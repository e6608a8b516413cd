"""The code blocks of all pages: what is Python runs, page by page; what is data parses; files shown are written.

A page that is new is covered as it is. What its blocks take for granted (a model, an optimizer, ...) is made in
`page_beginnings.py`; tutorials take nothing for granted and are run by `test_tutorials.py`.
"""

from __future__ import annotations

import ast
import json
import linecache
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from markdown_pages import ROOT, Block, blocks, name_of, pages
from page_beginnings import BEGINNINGS, write_files

LANGUAGES = {"bash", "csv", "diff", "json", "jsonl", "python", "shell", "text", "toml", "yaml"}
# Run by tests of their own, which also look at what comes out.
RUN_ELSEWHERE = {
    "README.md": "tests/test_readme.py",
    "docs/agent_loops.md": "tests/docs/test_agent_loops_page.py",
    "docs/custom_losses.md": "tests/examples/test_custom_losses_page.py",
}
ALL = [block for page in pages() for block in blocks(page)]


def to_run(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python" and block.not_run is None]


def label(block: Block) -> str:
    return f"{name_of(block.page)}:{block.line}"


def of(*languages: str) -> Any:
    found = [block for block in ALL if block.language in languages]
    return pytest.mark.parametrize("block", found, ids=label)


def test_every_fence_names_its_language_and_closes() -> None:
    for page in pages():
        assert len(re.findall(r"^ *```", page.read_text(), re.MULTILINE)) == 2 * len(blocks(page)), name_of(page)
    for block in ALL:
        assert block.language in LANGUAGES, label(block)
        assert block.not_run is None or len(block.not_run.split()) > 2, f"{label(block)}: the reason is no reason"


@of("python")
def test_python_compiles(block: Block) -> None:
    ast.parse(block.code)


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in pages()
        if to_run(page) and page.parent.name != "tutorials" and name_of(page) not in RUN_ELSEWHERE
    ],
    ids=name_of,
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    write_files(tmp_path)
    # A module: dataclasses and pickles look up where things were defined.
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    if name_of(page) in BEGINNINGS:
        vars(module).update(BEGINNINGS[name_of(page)](tmp_path))
    for block in to_run(page):
        if block.title is not None:
            Path(block.title).write_text(block.code)
            continue
        lines = block.code.splitlines(keepends=True)
        linecache.cache[label(block)] = (
            len(block.code),
            None,
            lines,
            label(block),
        )  # what a loss's source is read from
        exec(compile(block.code, label(block), "exec"), vars(module))


def test_pages_that_are_run_elsewhere_are() -> None:
    for page, test in RUN_ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text() or "README" in page
    assert BEGINNINGS.keys() <= {name_of(page) for page in pages()}


def objects(text: str) -> list[Any]:
    """The JSON values of a block, on one line or many; `...` stands for what is left out."""
    text = re.sub(r"(?<=\[)\.\.\.(?=\])|, \.\.\.(?=[\]}])", "", text).strip()
    found = []
    while text:
        value, end = json.JSONDecoder().raw_decode(text)
        found.append(value)
        text = text[end:].lstrip()
    return found


@of("json", "jsonl")
def test_json_parses(block: Block) -> None:
    found = objects(block.code)
    assert found
    assert block.language == "json" or all(isinstance(value, dict) for value in found)


@of("yaml")
def test_yaml_parses(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.code), dict)


@of("bash")
def test_files_of_the_repository_that_commands_name_exist(block: Block) -> None:
    for word in re.findall(r"(?<![\w/.-])(?:examples|benchmarks|docs|tests)/[\w/.-]+", block.code):
        assert (ROOT / word).exists(), word
