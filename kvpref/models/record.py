"""A record of what layers do in passes; `kvpref check` prints it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from kvpref.ops.attention import AttentionParams
from kvpref.prefix.rules import Rule


class AttentionCall(NamedTuple):
    """One call of attention."""

    module: nn.Module
    rule: Rule
    params: AttentionParams
    has_sink: bool
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int


@dataclass
class Record:
    """What layers did in the passes that ran."""

    calls: list[AttentionCall] = field(default_factory=list)

    modules: list[nn.Module] = field(default_factory=list)
    """Modules that mixed tokens: attention and recurrent layers."""


_record: ContextVar[Record | None] = ContextVar("kvpref_record", default=None)


@contextmanager
def recorded() -> Iterator[Record]:
    """Record the passes that run inside."""
    record = Record()
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


def is_recording() -> bool:
    """Whether a record is being kept."""
    return _record.get() is not None


def note_call(call: AttentionCall) -> None:
    """Record an attention call, if a record is being kept."""
    record = _record.get()
    if record is not None:
        record.calls.append(call)


def note_modules(modules: Iterable[nn.Module]) -> None:
    """Record which modules mixed tokens in a pass."""
    record = _record.get()
    if record is not None:
        record.modules.extend(module for module in modules if not any(module is known for known in record.modules))
