"""Every name that kvpref exports says what it is: the rule for docstrings, which other names may do without."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("kvpref", "kvpref.data", "kvpref.integrations.trl", "kvpref.losses", "kvpref.training")
FEWEST_WORDS = 4

Definition = ast.ClassDef | ast.FunctionDef


@cache
def tree_of(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def exported(module: str) -> list[str]:
    for node in tree_of(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    raise AssertionError(f"{module} has no __all__")


def definition_of(module: str, name: str) -> tuple[str, Definition | str]:
    """The module that defines a name, and the definition, or for other values the text under it."""
    body = tree_of(module).body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) == name:
                is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                return module, str(following.value.value) if is_text else ""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            return definition_of(str(node.module), name)
    raise AssertionError(f"{module} exports {name}, which it neither defines nor imports")


def members(kind: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """The public methods and properties of a class, except attributes that its own docstring lists."""
    for node in kind.body:
        is_listed = f"{node.name}:" in (ast.get_docstring(kind) or "") if isinstance(node, ast.FunctionDef) else True
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not is_listed:
            yield node


def undocumented(module: str, name: str) -> list[str]:
    home, found = definition_of(module, name)
    texts = {name: found} if isinstance(found, str) else {name: ast.get_docstring(found) or ""}
    # A subclass's methods are those of its base, which says what they do.
    if isinstance(found, ast.ClassDef) and all(ast.unparse(base) in ("NamedTuple", "Protocol") for base in found.bases):
        texts |= {f"{name}.{node.name}": ast.get_docstring(node) or "" for node in members(found)}
    return [f"{home}: {label}" for label, text in texts.items() if len(text.split()) < FEWEST_WORDS]


@pytest.mark.parametrize("module", PACKAGES)
def test_every_exported_name_has_a_docstring_that_says_something(module):
    assert [line for name in exported(module) for line in undocumented(module, name)] == []


def test_a_name_without_a_docstring_and_one_that_only_repeats_it_are_found(monkeypatch):
    source = '''
__all__ = ["silent", "brief", "LIMIT", "Clear"]
LIMIT = 3
"""The limit."""
def silent(): ...
def brief():
    """Brief."""
class Clear:
    """Something that a reader understands."""
    def close(self): ...
    def _open(self): ...
'''
    monkeypatch.setattr(f"{__name__}.tree_of", lambda module: ast.parse(source))
    found = [line for name in exported("it") for line in undocumented("it", name)]
    assert found == ["it: silent", "it: brief", "it: LIMIT", "it: Clear.close"]
