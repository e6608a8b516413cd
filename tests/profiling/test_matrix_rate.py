"""The rate of matrix products is FLOPs over the fastest round's time."""

from __future__ import annotations

import itertools

import torch
from torch.utils.flop_counter import FlopCounterMode

from kvpref.profiling.matrix_rate import measure_matrix_rate


def test_the_rate_is_the_flops_of_the_fastest_round_over_its_time() -> None:
    ends = iter(itertools.accumulate([0.0, 4.0, 1.0, 2.0, 1.0, 8.0]))  # rounds of 4, 2 and 8 seconds
    with FlopCounterMode(display=False) as counter:
        rate = measure_matrix_rate(torch.device("cpu"), torch.float32, clock=lambda: next(ends))
    # Three timed rounds of two products, and one product ahead of them.
    assert rate == counter.get_total_flops() / 7 * 2 / 2


def test_it_measures_in_the_dtype_of_the_run() -> None:
    assert measure_matrix_rate(torch.device("cpu"), torch.bfloat16) > 0
