"""Integers of vision towers on fake tensors: towers read them, to cut windows out of grids for example.

Fake tensors hold no values. So what is computed from real integers alone, in a tower, is computed for real.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from kvpref.profiling.memory.tracker import TOWER
from kvpref.tracing import current_region

_DEVICE = torch.ops.prim.device.default


class RealIntegers(TorchDispatchMode):
    """To be entered inside all other modes, where a tower runs: every operator pays for it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `kvpref.profiling.prediction.kernels`

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE:
            return args[0].fake_device  # asked for more often than all else
        kwargs = kwargs or {}
        if (current_region() or "").endswith(TOWER) and _is_of_integers(func, args, kwargs):
            with _disable_current_modes():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _is_of_integers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    dtypes = [leaf for leaf in leaves if isinstance(leaf, torch.dtype)]
    if any(isinstance(tensor, FakeTensor) or not _is_integer(tensor.dtype) for tensor in tensors):
        return False
    if dtypes:
        return all(map(_is_integer, dtypes))
    # Without a dtype, factories make floats of anything but ranges of integers.
    is_range = func.overloadpacket is torch.ops.aten.arange and all(type(leaf) is int for leaf in tree_leaves(args))
    return bool(tensors) or is_range


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex
