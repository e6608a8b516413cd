"""Equal keys mean equal bits, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvpref.models.vision import fingerprints
from kvpref.models.vision.fingerprints import image_keys


def image(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    values = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
    values = values > 0 if dtype == torch.bool else values.to(dtype)
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 4, 10]])}


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    found = image()
    found[name] = change(found[name].clone())
    return found


def swapped(values: torch.Tensor) -> torch.Tensor:
    values[[0, 1]] = values[[1, 0]]
    return values


def second_difference(values: torch.Tensor) -> torch.Tensor:
    """What weights that grow evenly with the position would not see."""
    bits = values.view(torch.int32)
    bits[0, :3] += torch.tensor([1, -2, 1], dtype=torch.int32)
    return values


OTHERS = {
    "another image": image(1),
    "rows in another order": changed("pixel_values", swapped),
    "the second difference of neighbours": changed("pixel_values", second_difference),
    "another shape": changed("pixel_values", lambda values: values.view(20, 12)),
    "another dtype": changed("pixel_values", lambda values: values.double()),
    "another grid": changed("image_grid_thw", lambda grid: grid.flip(1)),
    "an input less": {"pixel_values": image()["pixel_values"]},
}


@pytest.mark.parametrize("name", OTHERS)
def test_images_that_differ_have_other_keys(name: str) -> None:
    first, again, other = image_keys([image(), image(), OTHERS[name]])
    assert first == again
    assert other != first
    assert image_keys([image()]) == [first]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool])
def test_every_dtype(dtype: torch.dtype) -> None:
    first, again, other = image_keys([image(0, dtype), image(0, dtype), image(1, dtype)])
    assert first == again != other


def test_chunks_count_by_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_CHUNK", 60)
    halves = image()["pixel_values"].view(2, -1)
    first, turned = image_keys([{"pixel_values": halves}, {"pixel_values": halves.flip(0)}])
    assert first != turned


def test_equal_fingerprints_of_unequal_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compared bit by bit all the same."""
    monkeypatch.setattr(fingerprints, "_fingerprint", lambda *args: torch.zeros(2, dtype=torch.int64))
    one, again, other = image_keys([image(), image(), image(1)])
    assert one == again != other


def test_no_images() -> None:
    assert image_keys([]) == []


def test_the_host_waits_twice_whatever_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, own = [], torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> object:
        waits.append(tensor.shape)
        return own(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    assert len(set(image_keys([image(seed % 3) for seed in range(12)]))) == 3
    assert waits == [(12, 2), (9,)]


def test_where_an_image_stands_in_memory_does_not_matter() -> None:
    values = torch.zeros(1 + 240)
    values[1:] = image()["pixel_values"].flatten()
    apart, inside = image_keys([{"pixel_values": image()["pixel_values"].flatten()}, {"pixel_values": values[1:]}])
    assert apart == inside
    odd, again = image_keys([{"pixel_values": values[:3]}, {"pixel_values": values[:3].clone()}])
    assert odd == again
