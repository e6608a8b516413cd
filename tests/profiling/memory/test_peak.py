"""Peaks of calls whose allocations are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvpref.profiling.memory.peak import peak_bytes

CPU = torch.device("cpu")
MIB = 2**20


def block(num_mib: int) -> torch.Tensor:
    return torch.empty(num_mib * MIB, dtype=torch.uint8)


def test_freed_memory_does_not_count() -> None:
    def function() -> None:
        first, second = block(3), block(4)
        del first
        third = block(2)
        del second, third

    assert peak_bytes(function, CPU, resident_bytes=0) == 7 * MIB
    assert peak_bytes(function, CPU, resident_bytes=5) == 7 * MIB + 5


def test_what_a_call_leaves_behind_is_there_in_the_next() -> None:
    """As gradients are: held while the next step frees and allocates them again."""
    kept: list[torch.Tensor] = []

    def keeps() -> None:
        temporary = block(1)
        if not kept:
            kept.append(block(8))
        del temporary

    assert peak_bytes(keeps, CPU, resident_bytes=0) == 9 * MIB


def test_a_backward_pass() -> None:
    """The most is held at its end: the gradients of the product and of the weight. The loss takes a few bytes more."""
    layer = nn.Linear(1024, 1024, bias=False)
    rows = torch.ones(512, 1024)

    def step() -> None:
        layer.zero_grad()
        layer(rows).exp().sum().backward()

    output, weight = 512 * 1024 * 4, 1024 * 1024 * 4
    peak = peak_bytes(step, CPU, resident_bytes=0)
    assert output + weight <= peak <= output + weight + 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peaks_count_what_a_call_held_for_a_moment() -> None:
    device, size = torch.device("cuda"), 64 * MIB
    before = torch.cuda.memory_allocated(device)
    peak = peak_bytes(lambda: [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)], device, 0)
    assert peak == before + 2 * size
    assert torch.cuda.memory_allocated(device) == before


def test_frees_of_what_was_there_before_do_not_count() -> None:
    """A second profiler may see the end of an allocation that only an earlier one saw."""
    kept: list[torch.Tensor] = []

    def replaces() -> None:
        kept.clear()
        kept.append(block(2))

    assert [peak_bytes(replaces, CPU, resident_bytes=0) for _ in range(3)] == [2 * MIB] * 3
