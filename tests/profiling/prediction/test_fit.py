"""The search for the largest budget."""

from __future__ import annotations

import pytest

from kvpref.profiling.prediction.fit import Largest, largest_fitting


@pytest.mark.parametrize("first", [1, 3, 40])
@pytest.mark.parametrize(
    ("slope", "expected"), [(1000, 0), (900, 1), (101, 8), (100, 9), (91, 9), (90, 10), (23, 39), (7, 40)]
)
def test_the_largest_number_is_found(slope: int, expected: int, first: int) -> None:
    found = largest_fitting(lambda n: 100 + slope * n, 1000, resident_bytes=100, first=first, limit=40)
    assert found == Largest(number=expected, at_limit=expected == 40)


def test_steps_and_kinks_do_not_mislead() -> None:
    """Peaks that stay the same for a while, then grow in steps: what is found was tried, and is a step off at most."""
    peak_of = {number: 50 if number < 20 else 50 + number // 7 * 11 for number in range(1, 201)}
    expected = max(number for number, peak in peak_of.items() if peak <= 200)
    tried: list[int] = []

    def peak(number: int) -> int:
        tried.append(number)
        return peak_of[number]

    found = largest_fitting(peak, 200, resident_bytes=0, first=1, limit=200)
    assert found.number in tried
    assert expected - 7 < found.number <= expected
    assert len(tried) < 25


def test_a_line_through_two_tries_spares_the_next_one() -> None:
    tried: list[int] = []

    def peak(number: int) -> int:
        tried.append(number)
        return 100 + 10 * number

    # 0 holds less than the line says, so that the first guess is low.
    found = largest_fitting(peak, 295, resident_bytes=0, first=1, limit=100)
    assert found.number == 19
    assert 20 not in tried


def test_one_response_which_shares_nothing_is_on_no_line() -> None:
    peaks = {1: 90, 2: 91, 3: 92, 4: 93, 5: 200}
    found = largest_fitting(peaks.__getitem__, 95, resident_bytes=20, first=1, limit=5, lines_from=2)
    assert found.number == 4


def test_nothing_is_tried_where_the_weights_alone_are_too_large() -> None:
    def peak(number: int) -> int:
        raise AssertionError("tried")

    assert largest_fitting(peak, 10, resident_bytes=10, first=1, limit=5) == Largest(number=0, at_limit=False)
