"""Images are decoded once, known by their pixels, and refused when they cannot be used."""

from __future__ import annotations

import io

import pytest
from PIL import Image, ImageDraw
from vision_models import picture

from kvpref.data.reading.images import store as store_module
from kvpref.data.reading.images.decoding import decode, scaled_size, to_png
from kvpref.data.reading.images.store import ImageStore
from kvpref.data.reading.images.values import ImageValue
from kvpref.data.reading.messages import RowError
from kvpref.errors import RunError


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path)


def add(store, value):
    return store.add(ImageValue(value, "image"))


def saved(image, **settings):
    file = io.BytesIO()
    image.save(file, **settings)
    return file.getvalue()


def animation():
    return saved(picture(1), format="GIF", save_all=True, append_images=[picture(2)])


def test_one_picture_in_many_forms_is_one_image(store, tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(store_module, "decode", lambda content: decoded.append(content) or decode(content))
    content = to_png(picture(1))
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(content)
    first = add(store, "a.png")
    for value in (
        "a.png",
        "b.png",
        content,
        {"bytes": content, "path": "c.png"},
        picture(1),
        saved(picture(1), format="BMP"),
    ):
        assert add(store, value) is first
    assert first.source == tmp_path / "a.png"
    assert first.size == (40, 32)
    assert len(decoded) == 2, "of each content once"
    assert add(store, picture(2)).digest != first.digest


def test_pictures_in_memory_are_kept_to_the_pixel(store):
    assert add(store, picture(5)).read().tobytes() == picture(5).tobytes()


def test_pictures_stand_upright_in_rgb(store):
    turned = picture(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = add(store, saved(turned, format="PNG", exif=exif))
    assert stored.size == (32, 40)
    assert stored.read().tobytes() == turned.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert add(store, picture(1).convert("L")).read().mode == "RGB"


def noise():
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    ImageDraw.Draw(image).rectangle((2, 2, 9, 9), fill="red")
    return image


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no image at all", "`image` is not an image that can be read"),
        (b"", "`image` is empty"),
        (saved(noise(), format="PNG")[:-600], "`image` is truncated or broken"),
        (saved(noise(), format="JPEG")[:-600], "`image` is truncated or broken"),
        (animation(), "`image` has 2 frames; animated"),
        (Image.new("RGB", (0, 3)), "`image` has no pixels"),
        (saved(Image.new("I;16", (4, 3), 40_000), format="PNG"), "`image` has more than 8 bits per channel"),
        (Image.new("F", (4, 3), 0.5), "`image` has more than 8 bits per channel"),
    ],
)
def test_images_that_cannot_be_used(store, content, reason):
    for _ in range(2):  # again from what is remembered
        with pytest.raises(RowError, match=reason) as error:
            add(store, content)
    assert "0x" not in str(error.value).replace("0x3", ""), "the address of a buffer says nothing"


def test_missing_files_and_folders(store, tmp_path):
    with pytest.raises(RowError, match=r"`image` \(.*a.png\) does not exist"):
        add(store, "a.png")
    with pytest.raises(RowError, match="cannot be read"):
        add(store, str(tmp_path))


def test_a_file_that_changes_after_loading_is_noticed(store, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(to_png(picture(1)))
    stored = add(store, "a.png")
    path.write_bytes(to_png(picture(2)))
    with pytest.raises(RunError, match=r"a.png: the image changed after the data was read"):
        stored.read()
    path.unlink()
    with pytest.raises(RunError, match=r"a.png: the image can no longer be read"):
        stored.read()


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [((100, 50), None, (100, 50)), ((100, 50), 5000, (100, 50)), ((100, 50), 1250, (50, 25)), ((1000, 1), 10, (10, 1))],
)
def test_scaled_size(size, limit, expected):
    assert scaled_size(size, limit) == expected
