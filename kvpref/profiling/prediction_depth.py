"""A deep model's step from those of two shallow ones: layers that are alike hold alike.

Of two traces, of k and k+1 layers, the longer one has one more block of operators wherever the shorter one has k in a
row. What is held at an operator of some layer is affine in the number of layers below it and above it, so it is affine
in the depth both for the first layers, counted from the beginning of such a run, and for the last ones, counted from
its end; what lies between them is nowhere higher than at both ends. So the highest moment of n layers is the highest
among the first and last layers' moments, each extended along a line. tests/profiling/test_prediction_depth.py compares
this with whole runs, byte by byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from kvpref.profiling.prediction_step import Moment

SHALLOW = 4
"""Layers of the shallower trace: the two first and the two last ones."""


def extend(shallow: Sequence[Moment], deeper: Sequence[Moment], num_layers: int) -> list[Moment] | None:
    """The moments among which the highest of a model of `num_layers` layers is.

    Args:
        shallow: The trace of `SHALLOW` layers.
        deeper: The trace of one layer more.
        num_layers: At least as many as the deeper trace has.

    Returns:
        The first of them is before the step. None if the traces do not differ by repeated layers only.
    """
    stretches = [_by_region(shallow), _by_region(deeper)]
    if [name for name, _ in stretches[0]] != [name for name, _ in stretches[1]]:
        return None
    moments: list[Moment] = []
    for (_, short), (_, long) in zip(*stretches, strict=True):
        pairs = _align(short, long)
        if pairs is None:
            return None
        moments.extend(_extrapolate(first, second, num_layers - SHALLOW) for first, second in pairs)
    return moments


def _by_region(trace: Sequence[Moment]) -> list[tuple[str | None, list[Moment]]]:
    return [(name, list(stretch)) for name, stretch in groupby(trace, key=lambda moment: moment.region)]


def _align(short: Sequence[Moment], long: Sequence[Moment]) -> list[tuple[Moment, Moment]] | None:
    """Moments of one stretch that are the same operator of the same layer, counted from the nearer end."""
    names = [[moment.operator for moment in stretch] for stretch in (short, long)]
    from_start = _num_equal(names[0], names[1])
    from_end = _num_equal(names[0][::-1], names[1][::-1])
    if from_start + from_end < len(short):
        return None
    # What both ends could claim are the layers; each end takes half of them.
    cut = (from_start + len(short) - from_end) // 2
    return [*zip(short[:cut], long[:cut], strict=True), *zip(short[cut:], long[len(long) - len(short) + cut :], strict=True)]


def _num_equal(first: Sequence[str], second: Sequence[str]) -> int:
    return next((index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))


def _extrapolate(first: Moment, second: Moment, steps: int) -> Moment:
    def line(start: int, following: int) -> int:
        return start + steps * (following - start)

    categories = {**first.bytes_by_category, **second.bytes_by_category}
    return Moment(
        first.operator,
        first.region,
        line(first.total_bytes, second.total_bytes),
        {
            name: line(first.bytes_by_category.get(name, 0), second.bytes_by_category.get(name, 0))
            for name in categories
        },
    )
