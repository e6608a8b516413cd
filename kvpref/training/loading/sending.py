"""A step's inputs as a few large buffers: what a data worker sends to the process that trains.

A plan has hundreds of small tensors. Sent separately, each takes its own file descriptor, shared mapping and
page-locked memory. Here all tensors of a step form one buffer, all other arrays another, and the objects around them a
short message; at the other end tensors and arrays are views into the buffers.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from kvpref.training.loading.inputs import MicroBatchInputs, StepInputs

_ALIGNMENT = 64
"""In bytes; a multiple of every item's size, as views into a buffer require."""


@dataclass(frozen=True)
class _Place:
    """The place of a tensor in the buffer."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PackedStep:
    """A `StepInputs` to be sent.

    Attributes:
        message: The pickled objects, except what is in the buffers.
        tensors: (num_bytes,) uint8, all tensors.
        places: The place of each tensor.
        arrays: (num_bytes,) uint8, all numpy arrays.
        ends: The end of each array in `arrays`; the next starts at the next multiple of the alignment.
    """

    message: bytes
    tensors: torch.Tensor
    places: tuple[_Place, ...]
    arrays: torch.Tensor
    ends: tuple[int, ...]

    @classmethod
    def pack(cls, step: StepInputs) -> PackedStep:
        """Pack a step whose tensors are on the CPU.

        Raises:
            Exception: Whatever pickle raises if something cannot be sent.
        """
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(step)
        flat = list(map(_bytes_of, pickler.tensors))
        tensors, starts = _joined(flat)
        places = tuple(
            _Place(start, start + len(part), tensor.dtype, tuple(tensor.shape))
            for start, part, tensor in zip(starts, flat, pickler.tensors, strict=True)
        )
        raw = [np.frombuffer(buffer.raw(), dtype=np.uint8) for buffer in pickler.buffers]
        arrays, starts = _joined(raw)
        ends = tuple(start + len(part) for start, part in zip(starts, raw, strict=True))
        return cls(message=file.getvalue(), tensors=tensors, places=places, arrays=arrays, ends=ends)

    @property
    def num_bytes(self) -> int:
        return len(self.message) + self.tensors.numel() + self.arrays.numel()

    def pin_memory(self) -> StepInputs:
        """The step with its tensors in page-locked memory; DataLoader calls this in a separate thread."""
        return replace(self, tensors=self.tensors.pin_memory()).unpack()

    def unpack(self) -> StepInputs:
        """The step, with tensors and arrays as views into the buffers; arrays are read-only."""
        tensors = [self.tensors[place.start : place.stop].view(place.dtype).view(place.shape) for place in self.places]
        arrays = memoryview(self.arrays.numpy()).toreadonly()  # type: ignore[arg-type]
        starts = (0, *map(_aligned, self.ends))
        buffers = [arrays[start:end] for start, end in zip(starts, self.ends, strict=False)]
        step: StepInputs = _Unpickler(io.BytesIO(self.message), tensors, buffers).load()
        return step


class SentStep:
    """What a worker puts into its queue; it arrives as a `StepInputs`.

    Args:
        step: The step planned in the worker.
        pins: Whether the receiver puts it into page-locked memory. It then arrives as a `PackedStep`, which takes
            only one copy of one buffer.
    """

    def __init__(self, step: StepInputs, *, pins: bool) -> None:
        self._packed, self._pins = PackedStep.pack(step), pins

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _receive, (self._packed, self._pins)


class FailedStep:
    """A step that could not be made; asking for its micro-batches raises the original error.

    DataLoader would wrap the text of the worker's error in an error of its own.
    """

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __iter__(self) -> Iterator[MicroBatchInputs]:
        self._fail()

    @property
    def micro_batches(self) -> tuple[MicroBatchInputs, ...]:
        self._fail()

    @property
    def joined(self) -> NoReturn:
        self._fail()

    def _fail(self) -> NoReturn:
        raise self._error


class _Pickler(pickle.Pickler):
    """Pickles a message without its tensors and arrays."""

    def __init__(self, file: io.BytesIO) -> None:
        self.tensors: list[torch.Tensor] = []
        self.buffers: list[pickle.PickleBuffer] = []
        self._numbers: dict[int, int] = {}
        super().__init__(file, protocol=5, buffer_callback=self.buffers.append)

    def persistent_id(self, obj: Any) -> int | None:
        """The number of a tensor."""
        if type(obj) is not torch.Tensor or obj.requires_grad or obj.layout is not torch.strided:
            return None
        number = self._numbers.get(id(obj))
        if number is None:
            number = self._numbers[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return number


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[torch.Tensor], buffers: Sequence[memoryview]) -> None:
        super().__init__(file, buffers=buffers)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> torch.Tensor:
        """The tensor of a number."""
        return self._tensors[pid]


def _receive(packed: PackedStep, pins: bool) -> PackedStep | StepInputs:
    return packed if pins else packed.unpack()


def _bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    flat = tensor.contiguous().reshape(-1)
    if flat.stride(0) != 1:  # one element of what was broadcast counts as contiguous with any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    found: npt.NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return found


def _joined(parts: Sequence[npt.NDArray[np.uint8]]) -> tuple[torch.Tensor, list[int]]:
    """The parts in one buffer, and where each starts."""
    starts, end = [], 0
    for part in parts:
        starts.append(end)
        end = _aligned(end + len(part))
    joined = np.zeros(end, dtype=np.uint8)
    for start, part in zip(starts, parts, strict=True):
        joined[start : start + len(part)] = part
    return torch.from_numpy(joined), starts


def _aligned(number: int) -> int:
    return -(-number // _ALIGNMENT) * _ALIGNMENT
