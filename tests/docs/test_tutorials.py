"""Tutorials run as they are printed: all blocks of a page in order, in an empty folder beside `examples`.

Python blocks share their names, a block with ``title="FILE"`` is written to FILE, and bash runs in a shell that has
`kvpref` and `python`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from command_line import environment
from markdown_pages import DOCS, ROOT, Block, blocks, name_of

TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


def shell(block: Block, folder: Path) -> None:
    """Run a block of bash, which must succeed."""
    programs = folder.parent / "programs"
    programs.mkdir(exist_ok=True)
    for name, arguments in {"kvpref": "-m kvpref ", "python": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments}"$@"\n')
        (programs / name).chmod(0o755)
    paths = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=folder,
        env={**environment(), **paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{name_of(block.page)}:{block.line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.full
@pytest.mark.parametrize("page", TUTORIALS, ids=name_of)
def test_it_runs_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(folder)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for block in blocks(page):
        if block.not_run is not None:
            continue
        if block.title is not None:
            Path(block.title).write_text(block.code)
        elif block.language == "python":
            exec(compile(block.code, f"{name_of(page)}:{block.line}", "exec"), vars(module))
        elif block.language == "bash":
            shell(block, folder)
