"""Groups in flat arrays come back as they were, and fingerprints of runs before stay what they were."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from kvpref.data.storage import PackedGroups
from kvpref.records.groups import Group, Sequence
from kvpref.records.images import Image, PlacedImage


def _row(*tokens: int, scored: int = 1, **options: Any) -> Sequence:
    """A sequence whose last tokens are scored."""
    prompt = len(tokens) - scored
    return Sequence(tokens, [False] * prompt + [True] * scored, **options)


def _pixels() -> Mapping[str, Any]:
    return {}


PLAIN = [
    Group(
        [_row(1, 2, 3), _row(1, 2, 4, 70000, scored=2)], scores=[0.5, None], id="a", columns={"x": [1.0, 2.5], "y": "t"}
    ),
    Group([_row(5, 6)], ranks=[1.0], id="b"),
    Group([_row(7, 8), _row(7, 9)], labels=[True, False]),
]
TURNS = Sequence([1, 2, 3, 4, 5, 6], [False, True, True, False, True, False], weights=[0.5, 0.0, 2.0])
CAT = PlacedImage(Image(key="cat", token_id=9, num_tokens=2, read=_pixels), ((1, 3),))
TRAJECTORIES = [
    Group(
        [_row(1, 2, 3, earlier=[_row(1, 2), TURNS]), _row(1, 2, 9, weights=[3.0]), TURNS],
        scores=[1.0, 0.0, 2.0],
        columns={"advantage": [[0.5, 0.25], [1.0], [2.0]]},
    ),
    Group([_row(1, 9, 9, 4, images=[CAT], earlier=[_row(1, 9, 9, 5, 6, scored=2, images=[CAT]), _row(3, 4)])]),
]


@pytest.mark.parametrize("group", [*PLAIN, *TRAJECTORIES])
def test_groups_come_back_as_they_were(group: Group) -> None:
    packed = PackedGroups([PLAIN[0], group, PLAIN[1]])
    assert list(packed) == [PLAIN[0], group, PLAIN[1]]
    if not group.sequences[0].images:  # those are equal where they are the same objects
        assert list(pickle.loads(pickle.dumps(packed))) == [PLAIN[0], group, PLAIN[1]]


def test_groups_can_be_added_while_others_are_in_use() -> None:
    # Arrays that numpy looks into cannot grow.
    packed = PackedGroups(TRAJECTORIES[:1])
    group = packed[0]
    packed.append(PLAIN[0])
    assert (group, packed[1]) == (TRAJECTORIES[0], PLAIN[0])


def test_fingerprints_of_earlier_versions_last() -> None:
    # As computed before sequences could have weights or parts: runs and stored log-probs are known by them.
    packed = PackedGroups(PLAIN)
    assert packed.fingerprint() == "0014d199fd764a7203fb71e63bae58af2e97e0e75764df26bd23e81b770750b6"
    assert packed.digests().hex() == "4b8ad0bb0fff6f47b0f0ea5d0a12d673ec8205fba92b6f2e"


def test_fingerprints_tell_weights_and_parts_apart() -> None:
    groups = [
        Group([_row(1, 2, 3), _row(1, 2, 4)]),
        Group([_row(1, 2, 4, earlier=[_row(1, 2, 3)])]),
        Group([_row(1, 2, 3, weights=[1.0]), _row(1, 2, 4)]),
        Group([_row(1, 2, 3), _row(1, 2, 4, weights=[1.0])]),
        Group([_row(1, 2, 3), _row(1, 2, 4, weights=[0.5])]),
    ]
    assert len({PackedGroups([group]).fingerprint() for group in groups}) == len(groups)


def test_what_is_asked_of_all_tokens_reads_every_part() -> None:
    packed = PackedGroups(
        [
            Group([Sequence([1, 2, 3, 4], [False] * 3 + [True], earlier=[_row(1, 2, 7)])]),
            Group([_row(1, 9, 9, 4, images=[CAT], earlier=[_row(1, 9, 9, 5, images=[CAT])])]),
        ]
    )
    assert packed.token_ids() == {1, 2, 3, 4, 5, 7, 9}
    assert packed.beginning_of(0) == array("i", [1, 2])
    assert list(packed.beginning_of(1)) == [1, -1, -2]
    assert packed.images() == (CAT.image,)


def test_plain_groups_take_five_bytes_per_token() -> None:
    rows = [_row(*range(1, 1001), scored=500) for _ in range(20)]
    plain = len(pickle.dumps(PackedGroups([Group(rows)])))
    parts = len(pickle.dumps(PackedGroups([Group([Sequence(rows[0].ids, rows[0].flags, earlier=rows[1:])])])))
    # 20 thousand tokens, and a kilobyte or two for all that is kept per part and per group.
    assert max(plain, parts) < 5 * 20_000 + 2_000


def test_token_ids_must_fit() -> None:
    packed = PackedGroups()
    packed.append(Group([_row(1, 2**31 - 1)]))
    assert packed[0].sequences[0].ids.dtype == np.int64
    with pytest.raises(OverflowError, match=f"token id {2**31} does not fit"):
        packed.append(Group([_row(1, 2**31)]))
