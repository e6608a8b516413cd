"""Which images a token sees in models whose layers attend to images beside the text."""

from __future__ import annotations

import pytest

from kvpref.models.vision.cross_attention import _ends


@pytest.mark.parametrize(
    ("places", "ends"),
    [
        ([4], [None]),
        ([4, 9], [9, None]),
        ([4, 5], [None, None]),
        ([4, 5, 6, 11], [11, 11, 11, None]),
        ([2, 7, 8, 9], [7, None, None, None]),
    ],
)
def test_images_side_by_side_are_seen_together(places: list[int], ends: list[int | None]) -> None:
    assert _ends(places) == ends
