"""Reduces the forms in which a row may hold an image to three: a file, bytes, or a PIL image."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from kvpref.data.reading.messages import RowError, type_name

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# First bytes of the usual formats: PNG, JPEG, GIF, BMP, WebP, TIFF.
_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\x00", b"MM\x00*")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_KEYS = ("bytes", "image", "path", "url", "base64")
NUM_QUOTED_CHARS = 60


class ImageValue(NamedTuple):
    """A row's value for an image.

    Attributes:
        value: The value in any form, not yet checked.
        name: Its name in errors.
    """

    value: Any
    name: str


def resolve_image(given: ImageValue, folder: Path) -> Path | bytes | Picture:
    """The image as a path, bytes or a picture.

    Args:
        given: A path, a ``file://`` address, a data URL, base64, bytes, a PIL image, or an object with one of these.
        folder: The base of relative paths.

    Raises:
        RowError: If it has none of these forms, or is an address on the web.
    """
    value, name = given
    if isinstance(value, Mapping):
        found = [key for key in _KEYS if value.get(key) is not None]
        if not found:
            raise RowError(f"`{name}` is an object without {', '.join(f'`{key}`' for key in _KEYS)}")
        inner = value[found[0]]
        if isinstance(inner, Mapping):
            raise RowError(f"`{name}.{found[0]}` is an object; expected a path, bytes or a PIL image")
        if found[0] == "base64" and isinstance(inner, str) and not inner.startswith("data:"):
            return _from_base64(inner, name)
        return resolve_image(ImageValue(inner, f"{name}.{found[0]}"), folder)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return _from_text(value, name, folder)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if _is_picture(value):
        return value  # type: ignore[no-any-return]
    raise RowError(
        f"`{name}` must be an image: a path, bytes, a data URL, a PIL image or {{bytes, path}}; "
        f"found {type_name(value)}"
    )


def _is_picture(value: object) -> bool:
    # Without importing PIL, which is needed only if a row holds an image.
    return any(kind.__module__ == "PIL.Image" and kind.__name__ == "Image" for kind in type(value).__mro__)


def _from_text(value: str, name: str, folder: Path) -> Path | bytes:
    if value.startswith("data:"):
        head, comma, content = value.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RowError(
                f"`{name}` is a data URL that is not base64: {_quote(value)}; write data:image/png;base64,..."
            )
        return _from_base64(content, name)
    if value.startswith("file://"):
        address = urlsplit(value)
        if address.netloc not in ("", "localhost"):
            raise RowError(f"`{name}` names a file on another machine: {_quote(value)}; give a path on this one")
        return folder / url2pathname(address.path)
    if _SCHEME.match(value):
        raise RowError(
            f"`{name}` is an address ({_quote(value)}), and kvpref fetches nothing; download it and give its path"
        )
    path = folder / value
    plain = None if _exists(path) else _plain_base64(value)
    return path if plain is None else plain


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, or with a null byte
        return False


def _plain_base64(value: str) -> bytes | None:
    """The decoded text, if it is certainly base64: a path can be valid base64 too."""
    if len(value) < 64:
        return None
    try:
        content = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    return content if content.startswith(_BEGINNINGS) else None


def _from_base64(value: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"`{name}` is not valid base64 ({error})") from error


def _quote(value: str) -> str:
    return repr(value if len(value) <= NUM_QUOTED_CHARS else f"{value[: NUM_QUOTED_CHARS - 3]}...")
