"""The covering of settings that `make test` runs holds every pair of values."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from pairwise import covering, pairwise


@pytest.mark.parametrize("sizes", [(3, 4), (12, 5, 2), (4, 3, 3, 2)])
def test_every_pair_is_run(sizes: tuple[int, ...]) -> None:
    axes = [[f"{axis}{value}" for value in range(size)] for axis, size in enumerate(sizes)]
    run = [case.values for case in pairwise(*axes) if not case.marks]
    for first, second in combinations(range(len(axes)), 2):
        assert {(values[first], values[second]) for values in run} == set(product(axes[first], axes[second]))


def test_the_product_is_whole_and_the_covering_is_small() -> None:
    axes = (range(10), range(5), range(2))
    assert sorted(case.values for case in pairwise(*axes)) == sorted(product(*axes))
    assert 50 <= len(covering(*axes)) <= 60
