"""The demo: a task whose answers a program can check, a tiny model trained on it, and a comparison of the modes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpref.demo.files import write_files
    from kvpref.demo.task import check

__all__ = ["check", "write_files"]

_HOMES = {"check": "kvpref.demo.task", "write_files": "kvpref.demo.files"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvpref.demo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
