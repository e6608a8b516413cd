"""JSON without loss: objects that give a key twice, of which `json` keeps the last, are refused."""

from __future__ import annotations

import json
from typing import Any


class RepeatedKeyError(ValueError):
    """An object has a key twice."""


def decode_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        RepeatedKeyError: If an object at any depth has a key twice.
        ValueError: If it is not JSON.
        RecursionError: If it is nested too deeply.
    """
    return _STRICT.decode(text)


def decode_json_and_mark(text: str) -> Any:
    """Like `decode_json`, but objects that have a key twice become the error, in their place."""
    return _MARKING.decode(text)


def find_repeated_key(value: Any) -> RepeatedKeyError | None:
    """The first error in a value of `decode_json_and_mark`."""
    if isinstance(value, RepeatedKeyError):
        return value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for item in inside if (found := find_repeated_key(item)) is not None), None)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"an object has the key `{twice}` twice, of which only one can be meant; keep that one")
    return found


def _object_or_error(pairs: list[tuple[str, Any]]) -> dict[str, Any] | RepeatedKeyError:
    try:
        return _object(pairs)
    except RepeatedKeyError as error:
        return error


_STRICT = json.JSONDecoder(object_pairs_hook=_object)
_MARKING = json.JSONDecoder(object_pairs_hook=_object_or_error)
