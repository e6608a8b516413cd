"""Which groups of two versions of a dataset differ."""

from __future__ import annotations

from collections.abc import Sequence

DIGEST_BYTES = 8
"""Bytes of one group's digest: enough that two versions of a group do not agree by chance."""


def describe_difference(before: bytes, after: bytes, ids: Sequence[str | None]) -> str | None:
    """Name the first group that differs.

    Args:
        before: `PreferenceDataset.digests` of the old dataset.
        after: The same for the new dataset.
        ids: The ids of its groups.

    Returns:
        A description; None if they are equal.
    """
    old, new = _split(before), _split(after)
    if old == new:
        return None
    counts = f"{len(new)} groups in place of {len(old)}" if len(old) != len(new) else f"{len(new)} groups"
    changed = [index for index, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]]
    if changed:
        other = "other tokens, images, labels, scores or columns"
        where = f"the first of {len(changed)} groups with {other} is {ids[changed[0]]}"
    elif len(new) > len(old):
        where = f"the first new one is {ids[len(old)]}"
    else:
        where = f"the last one left is {ids[-1]}"
    return f"{counts}; {where}"


def _split(digests: bytes) -> list[bytes]:
    return [digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)]
