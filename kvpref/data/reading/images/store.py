"""Each image of a dataset once: where its bytes are, its size, and a digest of its content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvpref.data.reading.images.decoding import BadImageError, content_digest, decode, to_png, upright
from kvpref.data.reading.images.values import ImageValue, resolve_image
from kvpref.data.reading.messages import RowError
from kvpref.errors import RunError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


@dataclass(frozen=True)
class StoredImage:
    """An image that was decoded once and found valid.

    Args:
        digest: Digest of its pixels.
        size: Width and height, upright.
        source: A file, or its bytes.
    """

    digest: str
    size: tuple[int, int]
    source: Path | bytes = field(repr=False)

    def read(self) -> Picture:
        """The RGB picture.

        Raises:
            RunError: If the file is gone, or holds another picture than when the data was read.
        """
        try:
            picture = decode(self.source.read_bytes() if isinstance(self.source, Path) else self.source)
        except (OSError, BadImageError) as error:
            raise RunError(f"{self._name()}: the image can no longer be read ({error}); put the file back") from error
        if content_digest(picture) != self.digest:
            raise RunError(
                f"{self._name()}: the image changed after the data was read; put the file back, or start again"
            )
        return picture

    def _name(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else "an image held in memory"


class ImageStore:
    """Finds equal images, in whatever form rows hold them.

    Args:
        folder: The base of relative paths.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._of_path: dict[Path, StoredImage | str] = {}
        self._of_bytes: dict[bytes, StoredImage | str] = {}
        self._of_digest: dict[str, StoredImage] = {}

    def add(self, given: ImageValue) -> StoredImage:
        """Check one image, decoding it completely if it is new.

        Raises:
            RowError: If it is not an image, or cannot be used.
        """
        source = resolve_image(given, self._folder)
        if isinstance(source, Path):
            found = self._of_path.get(source)
            if found is None:
                found = self._of_path[source] = self._read_file(source)
        elif isinstance(source, bytes):
            found = self._add_bytes(source, source)
        else:
            found = self._add_picture(source)
        if isinstance(found, str):
            shown = f" ({source})" if isinstance(source, Path) else ""
            raise RowError(f"`{given.name}`{shown} {found}")
        return found

    def _read_file(self, path: Path) -> StoredImage | str:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return "does not exist; correct the path, which begins at the folder of the data"
        except (OSError, ValueError) as error:
            return f"cannot be read ({error})"
        return self._add_bytes(content, path.absolute())

    def _add_bytes(self, content: bytes, source: Path | bytes) -> StoredImage | str:
        known_by = hashlib.blake2b(content, digest_size=16).digest()
        if known_by not in self._of_bytes:
            try:
                self._of_bytes[known_by] = self._keep(decode(content), source)
            except BadImageError as error:
                self._of_bytes[known_by] = str(error)
        return self._of_bytes[known_by]

    def _add_picture(self, picture: Picture) -> StoredImage | str:
        try:
            return self._keep(upright(picture), None)
        except BadImageError as error:
            return str(error)

    def _keep(self, picture: Picture, source: Path | bytes | None) -> StoredImage:
        digest = content_digest(picture)
        if digest not in self._of_digest:
            kept = to_png(picture) if source is None else source
            self._of_digest[digest] = StoredImage(digest, picture.size, kept)
        return self._of_digest[digest]
