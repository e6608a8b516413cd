"""Several sources as one dataset: concatenated, or with weights."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import fields
from typing import Any

from kvpref.data.report import DataReport


def mix(sizes: Sequence[int], weights: Sequence[float], seed: int) -> list[int]:
    """Which groups make up an epoch of sources with weights.

    The epoch has as many groups as the sources have together, and each source contributes its share. Within a source
    every group appears equally often, or once less; `seed` draws which, so that all ranks agree.

    Args:
        sizes: Groups of each source, at least 1.
        weights: One above 0 per source, in any unit.
        seed: For the draw.

    Returns:
        Indices among all groups, source after source; within a source in its own order, pass after pass.
    """
    order: list[int] = []
    first = 0
    for number, (size, share) in enumerate(zip(sizes, _shares(sum(sizes), weights), strict=True)):
        passes, rest = divmod(share, size)
        drawn = sorted(random.Random(f"{seed}:{number}").sample(range(size), rest))
        order += [first + index for index in [*range(size)] * passes + drawn]
        first += size
    return order


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights that add up to the total (largest remainders)."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def copy_numbers(ids: Sequence[Hashable]) -> list[int]:
    """How often each id occurred before: 0 unless a group appears more than once."""
    seen: Counter[Hashable] = Counter()
    numbers = []
    for name in ids:
        numbers.append(0 if name is None else seen[name])
        seen[name] += 1
    return numbers


def tell_copies_apart(beginning: array[int], copy: int) -> array[int]:
    """The tokens that a group begins with, with a different first token for each copy of the group.

    Groups that begin alike go into one step, which copies of one group must not fill.
    """
    if not copy or not beginning:
        return beginning
    return array("q", [beginning[0] - (copy << 33), *beginning[1:]])  # ids of tokens and images have 32 bits


def merge_reports(reports: Sequence[DataReport], weights: Sequence[float] | None, order: Sequence[int]) -> DataReport:
    """One report for all sources: counts are added up, notices name their source.

    Args:
        reports: One per source.
        weights: As given, or None.
        order: The indices of an epoch, as `mix` gives them; not read without weights.
    """
    counts: dict[str, Any] = {
        item.name: sum(getattr(report, item.name) for report in reports)
        for item in fields(DataReport)
        if item.type == "int"
    }
    notices: list[str] = []
    first = 0
    for report in reports:
        seen = ""
        if weights is not None:
            number = sum(first <= index < first + report.num_groups for index in order)
            seen = _seen(number, report.num_groups, len(order))
        notices.append(f"{report.source}: {report.num_groups} groups{seen}")
        first += report.num_groups
    alike = set.intersection(*(set(report.notices) for report in reports))
    notices += [line for line in reports[0].notices if line in alike]
    notices += [f"{report.source}: {line}" for report in reports for line in report.notices if line not in alike]
    return DataReport(
        source=" + ".join(report.source for report in reports),
        bad_rows=tuple(row for report in reports for row in report.bad_rows),
        notices=tuple(notices),
        **counts,
    )


def _seen(number: int, num_groups: int, num_drawn: int) -> str:
    """How often an epoch of `num_drawn` groups, of which a source has `number`, comes to the source's groups."""
    if number:
        return f", {number} in an epoch: each {number / num_groups:.2f} times on average"
    return (
        f", none in an epoch, since its share of {num_drawn} groups is less than one; raise its weight, or leave it out"
    )
