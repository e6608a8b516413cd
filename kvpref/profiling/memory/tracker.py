"""What holds memory during a step, storage by storage: totals, peaks and a timeline, split into kinds of data.

A dispatch mode sees the results of every operator, forward and backward. Sizes are those of the storages, so that fake
tensors, which hold nothing, count like real ones: a step can be measured without running it.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kvpref.profiling.memory.timeline import MemorySnapshot, Sample, Timeline
from kvpref.tracing import current_region, observe_marks

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer"
PREFIX_KV, PREFIX_KV_GRADIENTS = "prefix K/V", "prefix K/V gradients"
PIXEL_INPUTS, IMAGE_FEATURES, IMAGE_FEATURE_GRADIENTS = "pixel inputs", "image features", "image feature gradients"
LOG_PROBS, BACKWARD, OTHER = "log-probs", "backward", "other"
ACTIVATIONS = "activations "
"""Before the name of a pass, or of the vision tower."""

TOWER = "vision tower"
VISION_ACTIVATIONS = ACTIVATIONS + TOWER
VISION_CATEGORIES = (VISION_ACTIVATIONS, PIXEL_INPUTS, IMAGE_FEATURES, IMAGE_FEATURE_GRADIENTS)

OUTSIDE = "outside"
"""Where `MemoryTracker.peak_by_region` puts what ran outside all regions."""

_CATEGORY_OF_REGION = {"optimizer": OPTIMIZER, "lm head": LOG_PROBS}
_RECOMPUTE = "recompute "


def category_of_region(region: str | None) -> str:
    """The category of what operators create in a region, as long as nothing says more about it."""
    if region is None:
        return OTHER
    if region.removeprefix(_RECOMPUTE).startswith(("pass ", TOWER)):
        return ACTIVATIONS + region.removeprefix(_RECOMPUTE)
    return BACKWARD if region.startswith(BACKWARD) else _CATEGORY_OF_REGION.get(region, OTHER)


class _Storage(weakref.ref[torch.UntypedStorage]):
    """A storage that is alive; it does not keep it so."""

    __slots__ = ("born", "category", "key", "num_bytes")
    born: int
    category: str
    key: int
    num_bytes: int


class MemoryTracker(TorchDispatchMode):
    """Follow the storages that operators create inside, as a context manager.

    A storage counts once, whatever views of it there are, from the operator that returns it until it is freed, with
    its own size: allocators round up (CUDA's to 512 bytes). It has one category, and is shown under it for all of its
    life: a temporary of the backward pass that ends as a gradient is a gradient from its beginning (one that is added
    to another first is not: the LM head's where its weight is tied). Categories:

    - ``parameters`` (with buffers), ``gradients``, ``optimizer``: those of the model and the optimizer;
    - what `kvpref.tracing.mark` announces: ``prefix K/V``, ``prefix K/V gradients``, ``log-probs``, ``pixel inputs``
      (of images, on the device), ``image features`` and ``image feature gradients`` (of the bounded schedule);
    - by the region in which it was created: ``activations vision tower`` (the features too, where it keeps its graph),
      ``activations pass d``, ``log-probs`` (the LM head's), ``backward``, ``optimizer``;
    - ``other``: all else, such as the batch, which is counted from the first operator that reads it.

    Not seen: memory that a kernel takes and frees while it runs, and so the workspace inside
    ``kvpref::cascade_forward`` and ``kvpref::cascade_backward``, of which only results are seen.
    `kvpref.profiling.memory.peak.peak_bytes` counts it, on real tensors. Where a mode watches, autograd adds up the
    gradients of a tensor that is used twice out of place; they are counted as if it did so in place, as it does
    otherwise. Layers under `torch.compile` run eagerly inside. Tensors on devices of another type than the model's
    are not counted.

    To follow fake tensors, enter the tracker inside the ``FakeTensorMode``. It can be entered once.

    Args:
        model: Its parameters, buffers and gradients are resident from the start; gradients are followed, those that
            autograd delivers and those that `kvpref.tracing.mark` announces.
        optimizer: Its state is resident from the start, and followed through its steps.
        keep_timeline: Whether to keep `timeline`.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, keep_timeline: bool = False
    ) -> None:
        super().__init__()
        self._model, self._optimizer = model, optimizer
        self._parameters = frozenset(model.parameters())
        parameter = next(iter((*model.parameters(), *model.buffers())), None)
        self._device_type = "cpu" if parameter is None else parameter.device.type
        self._storages: dict[int, _Storage] = {}
        self._freed: deque[_Storage] = deque()
        self._late: list[tuple[_Storage, int]] = []
        self._now = Sample(event=0, region=None)
        self._peak = self._now.copy()
        self._peaks: dict[str, Sample] = {}
        self._timeline = Timeline() if keep_timeline else None
        self._hooks = ExitStack()
        self._thread = threading.get_ident()

    @property
    def current(self) -> MemorySnapshot:
        """What is held now; after the end, what was held then."""
        self._settle()
        return self._now.freeze()

    @property
    def peak(self) -> MemorySnapshot:
        """The most that was held at once, and what it was."""
        return self._peak.freeze()

    @property
    def peak_by_region(self) -> Mapping[str, MemorySnapshot]:
        """Region -> the most that was held at once while it ran; `OUTSIDE` where none did."""
        return {name: sample.freeze() for name, sample in self._peaks.items()}

    @property
    def timeline(self) -> tuple[MemorySnapshot, ...]:
        """What was held over time, thinned to a few thousand points, the highest of each stretch; empty unless kept."""
        return () if self._timeline is None else self._timeline.freeze()

    def assign(self, category: str, *tensors: torch.Tensor) -> None:
        """Say what the storages of these tensors hold, also for the time that has passed."""
        self._settle()
        for tensor in tensors:
            if self._counts(tensor):
                self._assign(self._follow(tensor, category), category)

    def reset_peak(self) -> None:
        """Forget the peaks and the timeline: from now on they begin with what is held."""
        self._settle()
        self._peak, self._peaks = self._now.copy(), {}
        if self._timeline is not None:
            self._timeline = Timeline()
            self._timeline.add(self._now)

    def __enter__(self) -> MemoryTracker:
        self._thread = threading.get_ident()
        self.assign(PARAMETERS, *self._model.parameters(), *self._model.buffers())
        self._assign_gradients()
        self._assign_optimizer_state()
        if self._optimizer is not None:
            self._hooks.callback(self._optimizer.register_step_post_hook(self._on_step).remove)
        self._hooks.enter_context(observe_marks(lambda kind, tensors: self.assign(kind, *tensors)))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._hooks.close()
        self._settle()
        self._storages.clear()  # what is freed later changes nothing any more

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator, and count what it makes and what is freed meanwhile."""
        self._settle()
        self._now.region = self._region()
        for tensor in _tensors((args, kwargs)):
            if self._counts(tensor):
                self._follow(tensor, OTHER)
        results = self.call(func, args, kwargs)
        # Freed while the operator ran, before its results are counted: their memory may lie in the same place.
        self._settle()
        category = category_of_region(self._now.region)
        node = torch._C._current_autograd_node()
        is_late = _adds_in_place(node, func, args)
        for tensor in _tensors((results,)):
            if self._counts(tensor):
                self._follow(tensor, category, is_late=is_late)
        # Not by hooks on the parameters: the engine runs otherwise where somebody listens to their gradients.
        if node is not None and getattr(node, "variable", None) in self._parameters:
            self.assign(GRADIENTS, *_tensors((results,)))
        return results

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator; what `run` counts around."""
        return func(*args, **kwargs)

    def _region(self) -> str | None:
        """The innermost region. Autograd's threads for CUDA know none: there, the one of the thread that waits."""
        return current_region() if threading.get_ident() == self._thread else self._now.region

    def _counts(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._device_type and tensor.layout == torch.strided

    def _follow(self, tensor: torch.Tensor, category: str, *, is_late: bool = False) -> _Storage:
        """The storage of a tensor, counted under `category` if it was not known, and with the size that it has now.

        With `is_late` a new storage is counted after what is freed next.
        """
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is None:
            known = _Storage(storage, self._freed.append)
            known.key, known.category, known.num_bytes, known.born = key, category, 0, self._now.event + 1
            self._storages[key] = known
            if is_late:
                self._late.append((known, num_bytes))
                return known
        if known.num_bytes != num_bytes:  # new, or resized in place
            change, known.num_bytes = num_bytes - known.num_bytes, num_bytes
            self._change(known.category, change)
        return known

    def _assign(self, storage: _Storage, category: str) -> None:
        if storage.category == category:
            return
        # What is alive now and was born before a sample was alive in the sample too.
        samples = [self._now, self._peak, *self._peaks.values()]
        if self._timeline is not None:
            samples += self._timeline.since(storage.born)
        for sample in samples:
            if sample.event >= storage.born:
                sample.move(storage.num_bytes, storage.category, category)
        storage.category = category

    def _settle(self) -> None:
        """Take off what was freed. Not done in the callbacks: garbage collection may run them at any point."""
        while self._freed:
            storage = self._freed.popleft()
            del self._storages[storage.key]
            self._change(storage.category, -storage.num_bytes)
        late, self._late = self._late, []
        for storage, num_bytes in late:
            if self._storages.get(storage.key) is storage:
                storage.num_bytes = num_bytes
                self._change(storage.category, num_bytes)

    def _change(self, category: str, num_bytes: int) -> None:
        now = self._now
        now.change(category, num_bytes)
        name = now.region or OUTSIDE
        if name not in self._peaks or now.total > self._peaks[name].total:
            self._peaks[name] = now.copy()
        if now.total > self._peak.total:
            self._peak = now.copy()
        if self._timeline is not None:
            self._timeline.add(now)

    def _on_step(self, *_: Any) -> None:
        self._assign_optimizer_state()

    def _assign_gradients(self) -> None:
        self.assign(GRADIENTS, *(p.grad for p in self._model.parameters() if p.grad is not None))

    def _assign_optimizer_state(self) -> None:
        states = () if self._optimizer is None else self._optimizer.state.values()
        self.assign(OPTIMIZER, *_tensors(value for state in states for value in state.values()))


def _adds_in_place(node: Any, func: Any, args: tuple[Any, ...]) -> bool:
    """Whether autograd adds up gradients, in place if no mode watched: not into views, whose base it shares."""
    return (
        node is not None
        and func is torch.ops.aten.add.Tensor
        and not torch.is_grad_enabled()
        and not args[0]._is_view()
    )


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among values, and in the lists, tuples and dicts among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
