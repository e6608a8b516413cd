"""Extrapolates a deep model's step from those of two shallow ones, since identical layers hold equal memory.

Of two traces, of k and k+1 layers, the longer one has one more block of operators wherever the shorter one repeats a
layer's. What is held at an operator of some layer is affine in the number of layers before and after it. So it is
affine in the depth for the first layers, counted from the beginning of such a run, and for the last ones, counted from
its end; and of the layers between, none holds more at an operator than the two outermost of them do. So the highest
moment of n layers is the highest of the first and last layers' moments, each extended along its line.
tests/profiling/prediction/test_depth.py compares this with whole runs, byte by byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from kvpref.profiling.prediction.step import Moment

SHALLOW = 3
"""Layers of the shallower trace: the first one, one like all those between, and the last one."""


def extend(shallow: Sequence[Moment], deeper: Sequence[Moment], num_layers: int) -> list[Moment] | None:
    """Moments that include the highest one of a model with `num_layers` layers.

    Args:
        shallow: The trace of `SHALLOW` layers.
        deeper: The trace with one more layer.
        num_layers: At least as many as the deeper trace has.

    Returns:
        The moments, the first one before the step. None if the traces differ by more than repeated layers.
    """
    stretches = [_by_region(shallow), _by_region(deeper)]
    if [name for name, _ in stretches[0]] != [name for name, _ in stretches[1]]:
        return None
    moments: list[Moment] = []
    for (_, short), (_, long) in zip(*stretches, strict=True):
        pairs = _align(short, long)
        if pairs is None:
            return None
        moments.extend(_extrapolate(first, second, num_layers) for first, second in pairs)
    return moments


def _by_region(trace: Sequence[Moment]) -> list[tuple[str | None, list[Moment]]]:
    return [(name, list(stretch)) for name, stretch in groupby(trace, key=lambda moment: moment.region)]


def _align(short: Sequence[Moment], long: Sequence[Moment]) -> list[tuple[Moment, Moment]] | None:
    """Pairs of moments of one stretch at the same operator of the same layer, counted from the nearer end."""
    insertions = _find_insertions(_operators(short), _operators(long))
    if insertions is None:
        return None
    pairs: list[tuple[Moment, Moment]] = []
    start = shift = 0
    for insertion in (*insertions, _Insertion(len(short), 0, 0)):
        # The repeated layers before the insertion: each end takes half of them.
        cut = insertion.place - insertion.num_repeated // 2
        pairs.extend(zip(short[start:cut], long[start + shift : cut + shift], strict=True))
        start, shift = cut, shift + insertion.length
    return pairs


class _Insertion(NamedTuple):
    """The longer list has `length` extra names before `place` in the shorter one, repeating `num_repeated` names."""

    place: int
    length: int
    num_repeated: int


def _find_insertions(short: list[str], long: list[str], start: int = 0, shift: int = 0) -> list[_Insertion] | None:
    """Where the longer list repeats a block once more; None if there are other differences.

    Args:
        short: The shorter list of names.
        long: The longer list of names.
        start: Where to begin in `short`.
        shift: How many extra names come before in `long`.
    """
    place = start + _num_equal(short[start:], long[start + shift :])
    if place == len(short) and place + shift == len(long):
        return []
    for length in range(1, len(long) - len(short) - shift + 1):
        end = place + shift + length
        if long[end : end + 1] != short[place : place + 1]:
            continue
        num_repeated = _num_equal(short[start:place][::-1], long[start + shift : end][::-1])
        if num_repeated < (SHALLOW - 2) * length:
            continue
        following = _find_insertions(short, long, place, shift + length)
        if following is not None:
            return [_Insertion(place, length, num_repeated), *following]
    return None


def _operators(trace: Sequence[Moment]) -> list[str]:
    return [moment.operator for moment in trace]


def _num_equal(first: Sequence[str], second: Sequence[str]) -> int:
    return next((index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))


def extend_bytes(shallow: Mapping[str, int], deeper: Mapping[str, int], num_layers: int) -> dict[str, int]:
    """Bytes by category in a model with `num_layers` layers, from those of `SHALLOW` layers and of one more."""
    return {
        name: _line(shallow.get(name, 0), deeper.get(name, 0), num_layers - SHALLOW) for name in {**shallow, **deeper}
    }


def _extrapolate(first: Moment, second: Moment, num_layers: int) -> Moment:
    return Moment(
        first.operator,
        first.region,
        _line(first.total_bytes, second.total_bytes, num_layers - SHALLOW),
        extend_bytes(first.bytes_by_category, second.bytes_by_category, num_layers),
    )


def _line(first: int, second: int, steps: int) -> int:
    return first + steps * (second - first)
