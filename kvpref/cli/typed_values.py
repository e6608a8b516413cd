"""Converts values from YAML and the command line to declared types.

YAML 1.1 reads ``5e-7`` as text and ``no`` as false, and the command line has only text; the type of the field says what
a value means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from kvpref.errors import InputError

_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
"""A number in JSON and YAML 1.2, but text in YAML 1.1."""


class _UnexpectedError(Exception):
    """Carries what was expected."""


def read_value(value: Any, kind: Any, where: str, *, at_least: float | None = None, above: float | None = None) -> Any:
    """`value` as a `kind`.

    Args:
        value: The value as read by YAML.
        kind: A type as in an annotation. Unknown types accept any value.
        where: The setting's name in messages.
        at_least: The smallest number allowed.
        above: Exclusive lower bound of a number.

    Raises:
        InputError: Naming the setting, what was expected and what was found, in one line.
    """
    try:
        found = _read(value, kind)
        if isinstance(found, int | float) and not isinstance(found, bool):
            _check_range(found, at_least, above)
    except _UnexpectedError as error:
        raise InputError(f"{where}: expected {error}; got {value!r}") from None
    return found


def _check_range(number: float, at_least: float | None, above: float | None) -> None:
    if at_least is not None and number < at_least:
        raise _UnexpectedError(f"a number of at least {at_least:g}")
    if above is not None and number <= above:
        raise _UnexpectedError(f"a number above {above:g}")


def _read(value: Any, kind: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _read_any_of(value, arguments)
    if origin is Literal:
        return _read_choice(value, arguments)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _read_choice(value, [member.value for member in kind])
    shape = kind if origin is None else origin
    if shape in (dict, Mapping):
        return _read_mapping(value, arguments)
    if shape in (list, tuple, Sequence):
        return _read_list(value, arguments)
    reader = _READERS.get(kind)
    return value if reader is None else reader(value)


def _read_any_of(value: Any, kinds: Sequence[Any]) -> Any:
    # An enumeration in union with text lists its members; other text would fail late.
    if any(isinstance(kind, type) and issubclass(kind, Enum) for kind in kinds):
        kinds = [kind for kind in kinds if kind is not str]
    exact = [kind for kind in kinds if type(value) is (get_origin(kind) or kind)]
    expected = []
    for kind in [*exact, *kinds]:
        try:
            return _read(value, kind)
        except _UnexpectedError as error:
            expected.append(str(error))
    raise _UnexpectedError(" or ".join(dict.fromkeys(expected)))


def _read_choice(value: Any, choices: Iterable[Any]) -> Any:
    if value is False and "no" in choices:
        return "no"  # how YAML 1.1 reads a bare no
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise _UnexpectedError(f"one of {', '.join(map(str, choices))}")
    return value


def _read_mapping(value: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _UnexpectedError("a mapping")
    kind = arguments[1] if arguments else Any
    return {str(key): _read(item, kind) for key, item in value.items()}


def _read_list(value: Any, arguments: tuple[Any, ...]) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _UnexpectedError("a list")
    return [_read(item, arguments[0] if arguments else Any) for item in value]


def _read_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _UnexpectedError("true or false")
    return value


def _read_int(value: Any) -> int:
    number = _number(value, int)
    if number is None or not float(number).is_integer():
        raise _UnexpectedError("a whole number")
    return int(number)


def _read_float(value: Any) -> float:
    number = _number(value, float)
    if number is None or not math.isfinite(number):
        raise _UnexpectedError("a number")
    return number


def _number(value: Any, kind: type[int] | type[float]) -> int | float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        try:
            return kind(value) if kind is int and not _EXPONENT.fullmatch(value.strip()) else float(value)
        except ValueError:
            return None
    return None


def _read_str(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _UnexpectedError("text")
    return str(value)


def _read_none(value: Any) -> None:
    if value is not None:
        raise _UnexpectedError("nothing (null)")


def _read_untyped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _read_untyped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read_untyped(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


_READERS: dict[Any, Callable[[Any], Any]] = {
    Any: _read_untyped,
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_str,
    NoneType: _read_none,
}
