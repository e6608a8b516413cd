"""The names of training arguments, losses and their settings, read from the sources of their classes.

Importing these classes imports torch, which takes seconds; a misspelt name is answered without.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_ARGUMENTS = ("kvpref.training.arguments", "PreferenceTrainingArguments")
_LOSSES = ("kvpref.losses", "LOSSES")

_DEFINED_IN = {("transformers", "TrainingArguments"): "transformers.training_args"}
"""Modules of classes that a package imports only when asked."""

_ENUMERATIONS = {
    "HubStrategy": "transformers.trainer_utils",
    "IntervalStrategy": "transformers.trainer_utils",
    "OptimizerNames": "transformers.training_args",
    "SaveStrategy": "transformers.trainer_utils",
    "SchedulerType": "transformers.trainer_utils",
}
"""Modules of the enumerations that training arguments name."""


@cache
def training_arguments() -> Mapping[str, str]:
    """The annotation of every training argument, transformers' own among them, by name."""
    return fields_of(*_ARGUMENTS)


@cache
def losses() -> Mapping[str, tuple[str, str]]:
    """Module and class of every built-in loss, by name."""
    return dict(_entries(*_LOSSES))


@cache
def loss_settings(name: str) -> Mapping[str, str]:
    """The annotation of every setting of a built-in loss, by name."""
    return fields_of(*losses()[name])


@cache
def values_of(argument: str) -> tuple[str, ...]:
    """The values of a training argument that takes a member of an enumeration; empty for any other."""
    kinds = training_arguments().get(argument, "").split(" | ")
    for kind in kinds:
        found = _find_class(_ENUMERATIONS[kind], kind) if kind in _ENUMERATIONS else None
        if found is not None:
            members = (item.value for item in found[1].body if isinstance(item, ast.Assign))
            return tuple(str(item.value) for item in members if isinstance(item, ast.Constant))
    return ()


def fields_of(module: str, name: str) -> dict[str, str]:
    """The fields of a dataclass and its bases, each with its annotation as it is written; nothing is imported.

    Args:
        module: Where the class is defined, or imported by name.
        name: Of the class.
    """
    found = _find_class(module, name)
    if found is None:
        return {}
    home, definition = found
    fields: dict[str, str] = {}
    for base in definition.bases:
        if isinstance(base, ast.Name):
            fields |= fields_of(home, base.id)
    if any("dataclass" in ast.unparse(decorator) for decorator in definition.decorator_list):
        fields |= dict(_own_fields(definition))
    return fields


def _own_fields(definition: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for item in definition.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        annotation = ast.unparse(item.annotation)
        if not annotation.startswith("ClassVar") and not _is_made_later(item.value):
            yield item.target.id, annotation


def _is_made_later(default: ast.expr | None) -> bool:
    """Whether it is ``field(init=False)``."""
    settings = default.keywords if isinstance(default, ast.Call) else []
    return any(item.arg == "init" and ast.unparse(item.value) == "False" for item in settings)


def _find_class(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """The class and the module that defines it; None if no source says."""
    module = _DEFINED_IN.get((module, name), module)
    tree = _parse(module)
    for item in tree.body:
        if isinstance(item, ast.ClassDef) and item.name == name:
            return module, item
    origin = _imported_from(tree, name)
    return None if origin is None or origin == module else _find_class(origin, name)


def _imported_from(tree: ast.Module, name: str) -> str | None:
    for item in tree.body:
        if isinstance(item, ast.ImportFrom) and item.module and any(alias.name == name for alias in item.names):
            return item.module
    return None


def _entries(module: str, name: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Of a dictionary of classes at the top of a module: key, then module and name of the class."""
    tree = _parse(module)
    for item in tree.body:
        if isinstance(item, ast.AnnAssign) and ast.unparse(item.target) == name and isinstance(item.value, ast.Dict):
            for key, value in zip(item.value.keys, item.value.values, strict=True):
                assert isinstance(value, ast.Name)
                origin = _imported_from(tree, value.id) or module
                if key is None:  # **others
                    yield from _entries(origin, value.id)
                else:
                    assert isinstance(key, ast.Constant)
                    yield str(key.value), (origin, value.id)


@cache
def _parse(module: str) -> ast.Module:
    package, *rest = module.split(".")
    spec = find_spec(package)  # of a package alone it imports nothing
    if spec is None or not spec.submodule_search_locations:
        return ast.Module(body=[], type_ignores=[])
    path = Path(spec.submodule_search_locations[0]).joinpath(*rest)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module(body=[], type_ignores=[])
