"""Lanes that only keep account, on the CPU: which operator of which lane may run before which other one.

Every operator runs at once, as it is called. What a device would be free to do is known from vector clocks: an
operator comes after what its lane has run, and after what was over at the events that its lane waited for. Two
operators of which neither comes after the other, and that touch the same memory, one of them writing, are a race.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvpref.state.lanes import Lanes
from kvpref.tracing import observe_marks

Clock = Counter[str]


class Event(NamedTuple):
    lane: str
    clock: Clock


class CountingLane:
    def __init__(self, name: str, races: LaneRaces) -> None:
        self.name, self._races = name, races
        self.clock: Clock = Counter()

    def record(self) -> Event:
        return Event(self.name, self.clock.copy())

    def wait(self, event: Event) -> None:
        if (self.name, event.lane) != self._races.ignored:
            self.clock |= event.clock  # the later of each

    @contextmanager
    def running(self) -> Iterator[None]:
        before, self._races.current = self._races.current, self
        yield
        self._races.current = before


class _Memory(weakref.ref):  # type: ignore[type-arg]
    """A storage: who wrote it last, who has read it since, and what it is."""

    __slots__ = ("kind", "readers", "writer")


class LaneRaces(TorchDispatchMode):
    """While a step runs: its races, and what goes through its buffers.

    Args:
        ignored: (lane, other lane): the first one does not wait for events of the other one, as if that was forgotten.

    Attributes:
        races: What may happen in a wrong order.
        blocking: Operators that make the host wait, or let it compute with what the device writes.
        made: Kind -> buffers on the device made so far.
        most: Kind -> most of them at once.
        alive: Kind -> those there are.
    """

    def __init__(self, ignored: tuple[str, str] | None = None) -> None:
        super().__init__()
        self.ignored = ignored
        self.races: list[str] = []
        self.blocking: list[str] = []
        self.made: Counter[str] = Counter()
        self.alive: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.lanes = Lanes(*(CountingLane(name, self) for name in Lanes._fields))
        self.current: Any = self.lanes.compute
        self._memory: dict[int, _Memory] = {}
        self._stack = ExitStack()

    def __enter__(self) -> LaneRaces:
        self._stack.enter_context(observe_marks(self._note))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def _note(self, kind: str, tensors: tuple[torch.Tensor, ...]) -> None:
        """Of what is marked as prefixes' keys, values and gradients, bytes are buffers; all else is in host memory."""
        for tensor in tensors if kind.startswith("prefix") else ():
            is_buffer = tensor.dtype == torch.uint8
            self._of(tensor).kind = kind if is_buffer else "host"
            if is_buffer:
                self.made[kind] += 1
                self.alive[kind] += 1
                self.most[kind] = max(self.most[kind], self.alive[kind])

    def _of(self, tensor: torch.Tensor) -> _Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._memory:
            memory = _Memory(storage, lambda memory: self._freed(key, memory))
            memory.kind, memory.writer, memory.readers = None, None, {}
            self._memory[key] = memory
        return self._memory[key]

    def _freed(self, key: int, memory: _Memory) -> None:
        """Memory of the device goes back to compute at once; page-locked memory waits for what uses it."""
        del self._memory[key]
        if memory.kind == "host":
            return
        if memory.kind is not None:
            self.alive[memory.kind] -= 1
        self._check(self.lanes.compute, memory, "frees", writes=True)

    def _check(self, lane: Any, memory: _Memory, name: str, *, writes: bool) -> None:
        others = [*memory.readers.items()] if writes else []
        for other, tick in [*others, *([memory.writer] if memory.writer else [])]:
            if lane.clock[other] < tick:
                self.races.append(f"{lane.name}: {name} {memory.kind} beside {other}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten.record_stream.default
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
        places = {id(self._of(tensor)): self._of(tensor) for tensor in given}
        written = [
            self._of(tensor)
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value)
            if isinstance(tensor, torch.Tensor)
        ]
        result = func(*args, **(kwargs or {}))
        is_view = not written and any(item.alias_info is not None for item in func._schema.returns)
        if is_view:
            return result
        lane, name = self.current, func.name()
        lane.clock[lane.name] += 1
        if any(memory.kind == "host" for memory in places.values()) and not _is_asynchronous_copy(func, args):
            self.blocking.append(f"{lane.name}: {name}")
        for memory in places.values():
            if not any(memory is item for item in written):
                self._check(lane, memory, name, writes=False)
                memory.readers[lane.name] = lane.clock[lane.name]
        made = [self._of(tensor) for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        for memory in (*written, *(memory for memory in made if id(memory) not in places)):
            self._check(lane, memory, name, writes=True)
            memory.writer, memory.readers = (lane.name, lane.clock[lane.name]), {}
        return result


def _is_asynchronous_copy(func: Any, args: Any) -> bool:
    return func is torch.ops.aten.copy_.default and args[2:] == (True,)
