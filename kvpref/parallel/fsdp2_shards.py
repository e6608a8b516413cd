"""The shards that FSDP2 made of a model, and the open passes whose backward pass is still to come."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule

from kvpref.errors import RunError
from kvpref.models.attach import Program
from kvpref.models.output_layer import head_module
from kvpref.models.support import unwrap
from kvpref.models.vision.parts import vision_parts
from kvpref.parallel.fsdp2_groups import Fsdp2Groups, fsdp2_modules, keep_output_dtype

R = TypeVar("R")

_KEPT = "_kvpref_shards"


class Fsdp2Shards:
    """The shards of one model.

    Args:
        model: A sharded model, possibly wrapped.

    Attributes:
        root: The outermost module that FSDP2 wraps.
        groups: All its groups of parameters.
        sees_images: Whether some weights run only on ranks with images.
    """

    def __init__(self, model: nn.Module) -> None:
        self._inner = unwrap(model)
        modules = fsdp2_modules(model)
        self.root: Any = modules[0]
        self.groups = Fsdp2Groups(modules)
        for module in (self.root, head_module(self._inner)):
            keep_output_dtype(module)
        names = vision_parts(self._inner).weights
        self.sees_images = bool(names)
        # The modules that hold weights of the tower, which chunks of text do not need.
        self._towers = Fsdp2Groups(_owners(self._inner, names, self.root))
        self._open: ExitStack | None = None

    def begin(self, *, keeps_weights: bool, keeps_grads: bool) -> bool:
        """Keep gathered weights, or whole gradients, until `restore`.

        Returns:
            Whether this call started it.
        """
        if self._open is not None:
            return False
        self._open = ExitStack()
        self._open.enter_context(self.groups.kept(weights=keeps_weights, grads=keeps_grads))
        self._open.enter_context(self._towers.kept(weights=True, grads=True))
        if self.sees_images:  # the towers run inside its forward, on some ranks
            self._open.enter_context(Fsdp2Groups([self.root]).kept(weights=True, grads=False))
        return True

    def restore(self) -> None:
        """Undo `begin`; weights stay gathered until FSDP2 frees them."""
        if self._open is not None:
            self._open.close()
        self._open = None

    def end(self) -> None:
        """Restore, and free gathered weights, without a collective."""
        if self._open is not None:
            self.restore()
        self.groups.let_go()

    def forget(self) -> None:
        """Drop unreduced gradients, and whatever a failed pass left.

        Raises:
            RunError: If this version of torch cannot.
        """
        if not hasattr(self.root, "reset_iter_state"):
            raise RunError("continuing after a failed step of an FSDP2 model needs torch 2.13 or newer")
        self.restore()
        self.root.reset_iter_state()
        self.groups.drop_grads()

    def after_towers(self, program: Program[R]) -> Program[R]:
        """A program before which all ranks gather the towers."""
        if not self.sees_images:
            return program

        def run(model: Any) -> R:
            self._towers.gather()
            return program(model)

        return run

    def gather_all(self, model: nn.Module) -> None:
        """A program that gathers all weights."""
        self.groups.gather()

    def reduced_by_backward(self, made: R) -> R:
        """The outputs of passes, made such that their backward pass reduces all gradients at its end."""
        if not isinstance(made, dict):
            return made
        names = [name for name, value in made.items() if value.requires_grad]
        seen = _BeforeBackward.apply(self, *(made[name] for name in names))
        return {**made, **dict(zip(names, seen, strict=True))}  # type: ignore[return-value]

    def at_the_end_of_backward(self) -> None:
        """Let FSDP2's own callback, which comes next, reduce every group."""
        if self._open is None:
            return  # several micro-batches in one graph: done
        self.restore()
        if not self.root._get_fsdp_state()._state_ctx.post_backward_final_callback_queued:
            raise RunError(
                "gradients of a sharded model were not reduced: one backward pass went through kvpref's passes and, "
                "later in the graph, through a plain forward of the model; run their backward passes apart"
            )
        if self.groups.reduce:
            for weight in self._vision_weights():
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
        self.groups.reduce_at_the_end()

    def to_touch(self, model: nn.Module) -> Sequence[torch.Tensor]:
        """The weights that a touch must give gradients: those that other ranks may have used, and at least one."""
        something = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)
        return [something, *self._vision_weights()]

    def _vision_weights(self) -> list[nn.Parameter]:
        return [weight for weight in vision_parts(self._inner).weights.values() if weight.requires_grad]


class _BeforeBackward(torch.autograd.Function):
    """The identity; its backward pass runs before that of everything that made the tensors."""

    @staticmethod
    def forward(ctx: Any, shards: Fsdp2Shards, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.shards = shards
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        Variable._execution_engine.queue_callback(ctx.shards.at_the_end_of_backward)  # type: ignore[attr-defined]
        return (None, *grads)


def shards_of(model: nn.Module) -> Fsdp2Shards:
    """The shards of a model, one object for all its passes."""
    outermost: Any = fsdp2_modules(model)[0]
    # Inside the root's forward, `model` may be a part of what it wraps.
    states = outermost._get_fsdp_state()._state_ctx.all_states
    root = states[0]._modules[0] if states else outermost
    found: Fsdp2Shards | None = root.__dict__.get(_KEPT)
    if found is None:
        found = root.__dict__[_KEPT] = Fsdp2Shards(root)  # freed with the root: they refer to one another
    return found


def _owners(model: nn.Module, names: Sequence[str] | dict[str, nn.Parameter], root: FSDPModule) -> list[FSDPModule]:
    """The modules whose groups hold these weights: for each, the innermost FSDP2 module around it."""
    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    owners: dict[int, FSDPModule] = {}
    for name in names:
        path = name.rpartition(".")[0]
        while path not in wrapped and path:
            path = path.rpartition(".")[0]
        owner = wrapped.get(path, root)
        owners[id(owner)] = owner
    return list(owners.values())
