"""The groups of parameters that FSDP2 gathers and reduces together, and control over them.

PyTorch's functions to change their behaviour cannot be read back, but earlier settings, such as those of accelerate's
`no_sync`, must be restored. So this file alone reads the fields behind those functions (torch 2.11 to 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

_SETTINGS = ("post_forward_mesh_info", "reshard_after_backward", "reduce_grads", "all_reduce_grads")


class Fsdp2Groups:
    """All groups of some modules.

    Args:
        modules: The modules in order of registration, so the same on every rank.
    """

    def __init__(self, modules: Sequence[FSDPModule]) -> None:
        self._modules = modules

    @property
    def reduce(self) -> bool:
        """Whether gradients are reduced, which `no_sync` switches off."""
        return any(group.reduce_grads for group in self._groups())

    @contextmanager
    def kept(self, *, weights: bool, grads: bool) -> Iterator[None]:
        """While open, gathered weights stay gathered, or gradients stay whole on every rank.

        Args:
            weights: Whether weights stay gathered.
            grads: Whether gradients stay whole.
        """
        before = [(group, self._settings(module, group)) for module in self._modules for group in _groups_of(module)]
        for group, _ in before:
            if weights:
                group.post_forward_mesh_info, group.reshard_after_backward = None, False
            if grads:
                group.reduce_grads = group.all_reduce_grads = False
        try:
            yield
        finally:
            for group, values in before:
                for name, value in zip(_SETTINGS, values, strict=True):
                    setattr(group, name, value)

    def _settings(self, module: FSDPModule, group: Any) -> tuple[Any, ...]:
        values = [getattr(group, name) for name in _SETTINGS]
        state: Any = module._get_fsdp_state()
        if state._auto_reshard_after_forward and module is self._modules[0]:
            values[0] = None  # FSDP2 sets this when the root first runs, which may be inside
        return tuple(values)

    def gather(self) -> None:
        """Gather all weights that are not gathered yet."""
        for module in self._modules:
            module.unshard()

    def let_go(self) -> None:
        """Free gathered weights, without a collective."""
        for module in self._modules:
            module.reshard()

    def reduce_at_the_end(self) -> None:
        """Let FSDP2's callback at the end of this backward pass reduce all groups, including those already done."""
        for group in self._groups():
            group._training_state = TrainingState.IDLE

    def drop_grads(self) -> None:
        """Drop unreduced gradients."""
        for group in self._groups():
            for item in group.fsdp_params:
                item.unsharded_accumulated_grad = None
                if hasattr(item, "_unsharded_param"):
                    item._unsharded_param.grad = None

    def _groups(self) -> Iterator[Any]:
        for module in self._modules:
            yield from _groups_of(module)


def _groups_of(module: FSDPModule) -> Sequence[Any]:
    state: Any = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return several  # type: ignore[no-any-return]
    return () if state._fsdp_param_group is None else (state._fsdp_param_group,)


def keep_output_dtype(module: Any) -> None:
    """Keep the dtype of a module's outputs: with accelerate's bf16, FSDP2 would round them, and log-probs, to bf16."""
    if isinstance(module, FSDPModule):
        state: Any = module._get_fsdp_state()
        state._mp_policy = replace(state._mp_policy, output_dtype=None)


def fsdp2_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules of a model that FSDP2 shards, the root first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
