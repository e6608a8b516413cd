"""Each form in which a row may hold an image, and what is refused."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from vision_models import picture

from kvpref.data.reading.images.decoding import to_png
from kvpref.data.reading.images.values import ImageValue, resolve_image
from kvpref.data.reading.messages import RowError

PNG = to_png(picture(1))
TEXT = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.png", Path("/data/a.png")),
        ("../b/a.png", Path("/data/../b/a.png")),
        ("/x/a.png", Path("/x/a.png")),
        (Path("a.png"), Path("/data/a.png")),
        ("file:///x/a%20b.png", Path("/x/a b.png")),
        ({"path": "a.png"}, Path("/data/a.png")),
        ({"bytes": PNG, "path": "a.png"}, PNG),
        ({"url": "a.png"}, Path("/data/a.png")),
        (PNG, PNG),
        (bytearray(PNG), PNG),
        (f"data:image/png;base64,{TEXT}", PNG),
        ({"base64": TEXT}, PNG),
        (TEXT, PNG),
    ],
)
def test_forms(value, expected):
    assert resolve_image(ImageValue(value, "images[0]"), Path("/data")) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (
            "https://x.org/a.png",
            r"`images\[0\]` is an address \('https://x.org/a.png'\).*download it and give its path",
        ),
        ("s3://x/a.png", "fetches nothing"),
        ("file://host/a.png", "names a file on another machine"),
        ("data:image/png,abc", "data URL that is not base64"),
        ("data:image/png;base64,a?b", "not valid base64"),
        ({"base64": "%%"}, "not valid base64"),
        ({}, "is an object without `bytes`, `image`, `path`, `url`, `base64`"),
        ({"image": {"path": "a"}}, "`images.0..image` is an object"),
        (3, "must be an image.*found int"),
        (["a.png"], "must be an image.*found list"),
    ],
)
def test_what_is_no_image(value, reason):
    with pytest.raises(RowError, match=reason):
        resolve_image(ImageValue(value, "images[0]"), Path("/data"))


def test_a_long_name_is_a_path_unless_it_decodes_to_an_image(tmp_path):
    for name in ("a" * 80, "b" * 5000, "nul\0"):
        assert resolve_image(ImageValue(name, "i"), tmp_path) == tmp_path / name
