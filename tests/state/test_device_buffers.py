"""Buffers that are filled in turn: the order of waits and copies, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kvpref.state.device_buffers import Buffers, carve, room
from kvpref.state.lanes import Lanes


class WrittenDown:
    """A lane that writes down what it is asked for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log, self._count = name, log, 0

    def record(self) -> str:
        self._count += 1
        return f"{self.name} {self._count}"

    def wait(self, event: str) -> None:
        self._log.append(f"{self.name} waits for {event}")

    @contextmanager
    def running(self) -> Iterator[None]:
        self._log.append(f"{self.name}:")
        yield


class Run:
    def __init__(self) -> None:
        self.log: list[str] = []
        self.lanes = Lanes(*(WrittenDown(name, self.log) for name in Lanes._fields))
        device = torch.device("cpu")
        self.buffers = Buffers(self.lanes, 256, device, "made up", [self.lanes.compute, self.lanes.down])

    def fill(self, memory: torch.Tensor) -> int:
        self.log.append("copy")
        return memory.data_ptr()

    def taken(self) -> list[str]:
        """What was written down since the last call."""
        log, self.log[:] = list(self.log), []
        return log


COPY = ["up:", "copy"]


def test_a_copy_waits_for_what_used_its_buffer_and_compute_for_the_copy() -> None:
    run = Run()
    run.buffers.read("a", run.fill)
    assert run.taken() == ["up waits for compute 1", "up waits for down 1", *COPY, "compute waits for up 1"]
    run.buffers.begin("b", run.fill)
    assert run.taken() == ["up waits for compute 2", "up waits for down 2", *COPY]
    run.buffers.read("a", run.fill)
    assert run.taken() == []
    run.buffers.read("b", run.fill)
    assert run.taken() == ["compute waits for up 2"]
    run.buffers.read("b", run.fill)
    assert run.taken() == []


def test_what_was_read_last_is_not_overwritten() -> None:
    run = Run()
    first = run.buffers.read("a", run.fill)
    for key in ("b", "c", "d"):
        assert run.buffers.begin(key, run.fill) is not first
    assert run.buffers.find("b") is run.buffers.find("c") is None
    second = run.buffers.read("d", run.fill)
    assert second is not first
    assert run.buffers.begin("e", run.fill) is first
    assert (run.buffers.find("a"), run.buffers.find("d")) == (None, second)


def test_parts_lie_apart_and_their_versions_do_not_follow_the_memory() -> None:
    parts = [((3, 5), torch.float32), ((0, 5), torch.float32), ((7,), torch.bfloat16), ((2, 2), torch.float64)]
    memory = torch.zeros(room(3 * 5 * 4 + 7 * 2 + 4 * 8, len(parts)), dtype=torch.uint8)
    tensors = carve(memory, parts)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    versions = [tensor._version for tensor in tensors]
    for number, (tensor, (shape, dtype)) in enumerate(zip(tensors, parts, strict=True)):
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        assert tensor.eq(number).all()
        assert not tensor.data_ptr() % 16
    memory.zero_()
    assert [tensor._version for tensor in tensors] == versions


def test_memory_is_recognised_whatever_the_view() -> None:
    run = Run()
    buffer = run.buffers.read("a", run.fill)
    (part,) = carve(buffer.memory[128:], [((4, 2), torch.float32)])
    assert run.buffers.around(part.T[1:]) is buffer
    assert run.buffers.around(part.clone()) is None
    assert run.buffers.around(torch.empty(0)) is None


@pytest.mark.parametrize(("sizes", "num_parts"), [([1, 1, 1], 3), ([256, 256], 2), ([300, 1, 511], 3)])
def test_there_is_room_for_all_parts(sizes: list[int], num_parts: int) -> None:
    memory = torch.empty(room(sum(sizes), num_parts), dtype=torch.uint8)
    assert [part.numel() for part in carve(memory, [((size,), torch.uint8) for size in sizes])] == sizes
