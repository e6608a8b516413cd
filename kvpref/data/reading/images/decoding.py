"""Image files to RGB pictures, as transformers loads them: upright, without transparency, one frame."""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING

from kvpref.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class BadImageError(ValueError):
    """An image that cannot be used; the message says why, without its name."""


# Converting these to RGB clips every value at 255: a 16-bit picture becomes all white.
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def decode(content: bytes) -> Picture:
    """Decode a whole file.

    Raises:
        BadImageError: If it is not an image, is truncated, or holds several frames.
    """
    pil = import_pil()
    if not content:
        raise BadImageError("is empty")
    try:
        picture = pil.open(io.BytesIO(content))
    except Exception as error:  # format readers raise all kinds of errors for broken files
        raise BadImageError(f"is not an image that can be read ({_first_line(error)})") from error
    return upright(picture)


def upright(picture: Picture) -> Picture:
    """A picture in RGB, rotated according to its camera's metadata.

    Raises:
        BadImageError: If it is truncated, has no pixels, holds several frames, or has more than 8 bits per channel.
    """
    import_pil()
    from PIL import ImageOps

    # Cameras write JPEG files with a second picture inside (MPO); the first is the photograph.
    num_frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    if num_frames > 1:
        raise BadImageError(
            f"has {num_frames} frames; animated images are not supported: give one frame as its own image"
        )
    if 0 in picture.size:
        raise BadImageError(f"has no pixels ({picture.width}x{picture.height})")
    if picture.mode in _DEEP_MODES:
        raise BadImageError(f"has more than 8 bits per channel (mode {picture.mode}); save it with 8")
    try:
        picture.load()
        return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:
        raise BadImageError(f"is truncated or broken ({_first_line(error)})") from error


def scaled_size(size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    """The (width, height) of an image limited to `max_pixels` pixels, keeping its aspect ratio."""
    width, height = size
    if max_pixels is None or width * height <= max_pixels:
        return size
    factor = (max_pixels / (width * height)) ** 0.5
    # Rounding down keeps the limit, unless one side is already one pixel.
    return max(1, min(int(width * factor), max_pixels)), max(1, min(int(height * factor), max_pixels))


def scale(picture: Picture, max_pixels: int | None) -> Picture:
    """The picture, scaled down if it has more than `max_pixels` pixels."""
    size = scaled_size(picture.size, max_pixels)
    return picture if size == picture.size else picture.resize(size, import_pil().Resampling.BICUBIC)


def content_digest(picture: Picture) -> str:
    """Hex digest of size and pixels of an RGB picture."""
    digest = hashlib.blake2b(f"{picture.width}x{picture.height}:".encode(), digest_size=16)
    digest.update(picture.tobytes())
    return digest.hexdigest()


def to_png(picture: Picture) -> bytes:
    """A picture as a lossless file."""
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def import_pil():  # type: ignore[no-untyped-def]
    """The module `PIL.Image`.

    Raises:
        InputError: If it is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("the data has images, and Pillow is not installed: pip install pillow") from error
    return Image


def _first_line(error: Exception) -> str:
    # PIL's message contains the address of the buffer it read from.
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.split(" <_io.")[0]
