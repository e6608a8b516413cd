"""A watch on what would make the host wait for a CUDA device: reads of its values, and copies to it.

On machines without one: tensors on the device ``meta`` stand in for the device's, or those on the CPU, of which only
the reads can be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.equal.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item}
MAKERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}


class WaitError(RuntimeError):
    """The host would wait for the device."""


class _Calls(TorchFunctionMode):
    """What is seen in Python only: lists that become tensors on the device, and reads of whole tensors."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if function in MAKERS:
            own = args[0].device if function is torch.Tensor.new_tensor else None
            device = given.get("device", own)
            if device is not None and torch.device(device).type == self._device_type:
                raise WaitError(f"{function.__name__} copies from the host")
        if function in METHODS and args[0].device.type == self._device_type:
            raise WaitError(f"{function.__name__} reads from the device")
        return function(*args, **given)


class _Operations(TorchDispatchMode):
    """What every operation is seen in, in forward and backward."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        tensors = [item for item in tree_leaves((args, given)) if isinstance(item, torch.Tensor)]
        if any(item.device.type == self._device_type for item in tensors):
            self._check(function, tensors, args, given)
        if function in COPIES and "device" in given:
            self._check_devices(function, {*(item.device.type for item in tensors), torch.device(given["device"]).type})
        return function(*args, **given)

    def _check(self, function: Any, tensors: list[torch.Tensor], args: Any, given: dict[str, Any]) -> None:
        if function in READS or (function is aten.repeat_interleave.Tensor and given.get("output_size") is None):
            raise WaitError(f"{function} reads from the device")
        if function in INDEXING and any(
            item is not None and item.dtype in (torch.bool, torch.uint8) for item in args[1]
        ):
            raise WaitError(f"{function} with a mask reads from the device how many there are")
        # A CPU scalar may take part in arithmetic: it is handed to the kernel.
        several = [item for item in tensors if item.ndim or function in COPIES]
        self._check_devices(function, {item.device.type for item in several})

    def _check_devices(self, function: Any, found: set[str]) -> None:
        if len(found) > 1 and self._device_type in found:
            raise WaitError(f"{function} copies between {' and '.join(sorted(found))}")


@contextmanager
def refused(device_type: str) -> Iterator[None]:
    """While open, what would make the host wait for a device of this type raises `WaitError`."""
    with _Calls(device_type), _Operations(device_type):
        yield


@contextmanager
def allowed() -> Iterator[None]:
    """Inside `refused`: while open, the host may wait."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield
