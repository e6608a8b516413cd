"""Losses that users bring: a function in a file or a module, or an entry point of an installed package.

A loss is named by ``path/to/file.py:NAME``, ``package.module:NAME``, or an entry point in the group ``kvpref.losses``.
NAME is a function ``loss(policy, reference, batch, *, setting=default)``, whose further parameters are its settings, or
a subclass of `PreferenceLoss`, which is made with them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

from kvpref.errors import InputError
from kvpref.losses.interface import PreferenceLoss, as_loss

ENTRY_POINT_GROUP = "kvpref.losses"
NUM_LOSS_ARGUMENTS = 3
"""policy, reference, batch; what follows them are settings."""

_LIBRARY_ROOTS = (
    Path(__file__).resolve().parents[1],
    *(Path(sysconfig.get_paths()[name]).resolve() for name in ("stdlib", "purelib", "platlib")),
)


def find_loss(name: str, built_in: Iterable[str]) -> Any:
    """The object that a name stands for, if it is not built in.

    Args:
        name: ``file.py:NAME``, ``package.module:NAME``, or the name of an entry point. Paths are relative to the
            current folder.
        built_in: The names of the built-in losses, for the error message.

    Raises:
        InputError: If there is no such loss, or its code cannot be imported; the message names the line that failed.
    """
    if ":" in name or name.endswith(".py"):
        return _find_in_source(name)
    installed = installed_losses()
    if name in installed:
        with _importing(name):
            return installed[name].load()
    known = ", ".join([*built_in, *installed])
    raise InputError(f"unknown loss {name!r}; choose from: {known}; or give one of yours as FILE.py:FUNCTION")


def installed_losses() -> dict[str, EntryPoint]:
    """Losses that installed packages add, by name, without importing them."""
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}


def construct_loss(name: str, target: Any, settings: Mapping[str, Any]) -> PreferenceLoss:
    """Make a loss with its settings.

    Args:
        name: The user's name for it.
        target: A subclass of `PreferenceLoss`, an instance without settings, or a function.
        settings: By name.

    Raises:
        InputError: If the target is not a loss, or a setting is unknown, missing or refused.
    """
    is_class = isinstance(target, type)
    if isinstance(target, PreferenceLoss):
        if settings:
            raise InputError(f"loss {name!r} is already made and takes no settings; found {', '.join(settings)}")
        return target
    if not callable(target) or (is_class and not issubclass(target, PreferenceLoss)):
        what = f"the class {target.__name__}" if is_class else f"a {type(target).__name__}"
        raise InputError(
            f"loss {name!r} is {what}; expected a function (policy, reference, batch) or a subclass of "
            "kvpref.losses.PreferenceLoss"
        )
    _check_settings(name, target, settings)
    try:
        return target(**settings) if is_class else as_loss(functools.partial(target, **settings))
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        raise InputError(f"loss {name!r} cannot be made with {given or 'its defaults'}: {error}") from error


def settings_of(target: Any) -> list[inspect.Parameter]:
    """The settings of a loss class or function, in the order in which it declares them."""
    parameters = list(inspect.signature(target).parameters.values())
    if not isinstance(target, type):
        positional = [item for item in parameters if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)]
        parameters = [item for item in parameters if item not in positional[:NUM_LOSS_ARGUMENTS]]
    return [item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]


def _check_settings(name: str, target: Any, settings: Mapping[str, Any]) -> None:
    own = settings_of(target)
    valid = ", ".join(item.name for item in own) or "none"
    takes_any = any(item.kind is item.VAR_KEYWORD for item in inspect.signature(target).parameters.values())
    unknown = [setting for setting in settings if setting not in {item.name for item in own}]
    if unknown and not takes_any:
        raise InputError(f"loss {name!r} has no setting {unknown[0]!r}; it has: {valid}")
    missing = [item.name for item in own if item.default is item.empty and item.name not in settings]
    if missing:
        raise InputError(f"loss {name!r} needs the setting {missing[0]!r}; its settings: {valid}")
    if not isinstance(target, type):
        try:
            inspect.signature(target).bind(*[None] * NUM_LOSS_ARGUMENTS, **settings)
        except TypeError as error:
            raise InputError(
                f"loss {name!r} must take (policy, reference, batch), its settings after them; {error}"
            ) from error


def _find_in_source(spec: str) -> Any:
    source, _, attribute = spec.rpartition(":")
    if not source or not attribute:
        raise InputError(f"loss {spec!r}: expected FILE.py:FUNCTION or package.module:FUNCTION")
    with _importing(spec):
        module = _load_file(Path(source)) if source.endswith(".py") else _import_module(spec, source)
    if not hasattr(module, attribute):
        own = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__ and not key.startswith("_")
        ]
        raise InputError(f"{source} has no {attribute!r}; it defines: {', '.join(own) or 'no function'}")
    return getattr(module, attribute)


def _load_file(path: Path) -> ModuleType:
    """Run a file as a module, once per version of it; its folder is importable meanwhile."""
    try:
        version = hashlib.sha256(f"{path.resolve()}:".encode() + path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise InputError(f"{path}: cannot read the file of the loss ({error.strerror}); check the path") from error
    name = f"kvpref_loss_{path.stem}_{version}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it runs
    try:
        with _importable(path.resolve().parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(spec: str, name: str) -> ModuleType:
    try:
        with _importable(Path.cwd()):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise InputError(
            f"loss {spec!r}: there is no module {error.name!r}; give FILE.py:FUNCTION, or a module that is installed "
            "or in the current folder"
        ) from error


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have removed it
            sys.path.remove(str(folder))


@contextlib.contextmanager
def _importing(spec: str) -> Iterator[None]:
    """Turn whatever the user's code raises on import into one InputError with the line that failed."""
    try:
        yield
    except InputError as error:
        if _user_line(error) is None:
            raise
        raise InputError(f"{_user_line(error)}: {error}") from error
    except (Exception, SystemExit) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise InputError(
            f"{_user_line(error) or spec}: {type(error).__name__}: {' '.join(reason.split())}; the code of the loss "
            f"{spec!r} cannot be imported"
        ) from error


def _user_line(error: BaseException) -> str | None:
    """``file:line`` of the innermost frame that is neither kvpref's nor a library's, or None."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_file()]
    own = [frame for frame in frames if not _is_library(Path(frame.filename).resolve())]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


def _is_library(path: Path) -> bool:
    return any(path.is_relative_to(root) for root in _LIBRARY_ROOTS)
