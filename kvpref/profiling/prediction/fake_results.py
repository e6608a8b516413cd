"""Results of operators on fake tensors, made from a few integers where a like call was seen before.

A step makes some ten thousand calls of a few hundred kinds. PyTorch remembers results too, but tells calls apart by all
that tensors may be; here they are dense, on one device and without symbolic sizes. This halves the time of a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import in_kernel_invocation_manager

_CPU = torch.device("cpu")
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.layout, torch.memory_format})
_OTHER_SIZES = frozenset({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view})


class _Result(NamedTuple):
    """Of an operator; `size` is None if it is the first argument itself."""

    size: torch.Size | None
    stride: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    storage_offset: int | torch.SymInt = 0
    is_view: bool = False
    """Whether it has the storage of the first argument."""


_KNOWN: dict[tuple[Any, ...], _Result] = {}
"""By operator, shapes and settings; of all modes."""


def run(mode: FakeTensorMode, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operator, as ``func(*args, **kwargs)`` makes it.

    Args:
        mode: The mode of its fake tensors, which are on the CPU; it is active.
        func: The operator.
        args: Its arguments.
        kwargs: Its named arguments.
    """
    parts: list[Any] = [func]
    if not _follows_from_sizes(func) or not _describe(args, parts) or not _describe(kwargs.items(), parts):
        return func(*args, **kwargs)
    key = tuple(parts)
    known = _KNOWN.get(key)
    if known is None:
        result = func(*args, **kwargs)
        if (known := _remember(result, args)) is not None:
            _KNOWN[key] = known
        return result
    if known.size is None:
        return args[0]
    with in_kernel_invocation_manager(mode):
        made = torch.empty_strided(known.size, known.stride, dtype=known.dtype, device="meta")
        if known.is_view:
            made.set_(args[0].untyped_storage(), known.storage_offset, known.size, known.stride)
    return FakeTensor(mode, made, _CPU)


@cache
def _follows_from_sizes(func: OpOverload) -> bool:
    """Whether an operator's only result follows from the sizes of its arguments; it may change the first one."""
    arguments, returns = func._schema.arguments, func._schema.returns
    return (
        func.namespace == "aten"
        and _OTHER_SIZES.isdisjoint(func.tags)
        and [str(item.type) for item in returns] == ["Tensor"]
        and str(arguments[0].type) == "Tensor"
        and not any(item.alias_info is not None and item.alias_info.is_write for item in arguments[1:])
    )


def _describe(values: Iterable[Any], parts: list[Any]) -> bool:
    """Add to `parts` what a result depends on; False if there is more than fake tensors and plain values."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            parts += (value.shape, value.stride(), value.dtype, value.storage_offset())
        elif kind in _PLAIN:
            parts += (kind, value)
        elif kind is tuple or kind is list:
            parts += (kind, len(value))
            if not _describe(value, parts):
                return False
        elif kind is not torch.device or value != _CPU:
            return False
    return True


def _remember(result: Any, args: tuple[Any, ...]) -> _Result | None:
    """What to make a like result of; None if that takes more."""
    if result is args[0]:
        return _Result(None)
    if type(result) is not FakeTensor:
        return None
    storage, place = result.untyped_storage(), result.storage_offset()
    # Operators such as _unsafe_view share a storage without saying so.
    is_view = storage._cdata == args[0].untyped_storage()._cdata
    if not is_view and (place or storage.nbytes() != result.nbytes):
        return None
    return _Result(result.shape, result.stride(), result.dtype, place, is_view)
