"""How the engine runs a micro-batch: everything that affects time and memory, and what may affect results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from kvpref.errors import InputError
from kvpref.models.checkpointing import CHECKPOINTS
from kvpref.ops.attention import get_backend
from kvpref.parallel.sharding import TIMES, Sharding
from kvpref.plan.modes import MODES

SCHEDULES = ("full", "bounded")
PREFIX_CACHES = ("device", "cpu")
DEFAULT_MAX_TOKENS_PER_CHUNK = 8192


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Mode, schedule and their settings; unknown values and combinations that do not fit are refused at once."""

    mode: str = "two_pass"
    """``two_pass``, ``one_pass``, ``packed`` or ``padded``."""

    backend: str = "auto"
    """Attention backend, or ``auto``; mode ``padded`` runs the model's own attention and takes ``auto`` only."""

    schedule: str = "full"
    """``full`` keeps the graph of the whole micro-batch; ``bounded`` that of at most `max_tokens_per_chunk` tokens."""

    max_tokens_per_chunk: int | None = None
    """Most tokens whose activations are held at once in schedule ``bounded``; None for 8192. An image or prompt whose
    tokens see one another in both directions is never cut, so a longer one makes a longer chunk."""

    prefix_cache: str = "device"
    """Where keys and values of prefixes are kept: ``device`` or ``cpu`` (schedule ``bounded``)."""

    checkpoint: str = "none"
    """Which passes recompute their activations: ``none``, ``prefix`` (those that others read) or ``all``."""

    prefix_grad: bool = True
    """False stops gradients at the keys and values of prompts: an approximation that skips the prompts' backward."""

    gather_weights: str = "chunk"
    """How long weights of a sharded model (FSDP2, ZeRO-3) stay gathered in schedule ``bounded``: ``chunk``, each layer
    for a chunk's forward or backward pass, or ``step``, all layers until the end of the step. In ``full`` they stay
    gathered for the passes of a micro-batch."""

    reduce_grads: str = "chunk"
    """When the gradients of a sharded model are averaged over ranks: ``chunk``, after each chunk (``bounded``) or
    micro-batch (``full``), or ``step``, once per optimizer step; until then each rank holds whole gradients."""

    router_aux_loss_coef: float | None = None
    """Factor on the load-balancing loss of a mixture of experts, which is added to the loss; None leaves it out. That
    loss is the one that transformers computes over the sequences of a micro-batch, each token as often as it occurs."""

    def __post_init__(self) -> None:
        for name, valid in (
            ("mode", MODES),
            ("schedule", SCHEDULES),
            ("prefix_cache", PREFIX_CACHES),
            ("checkpoint", CHECKPOINTS),
            ("gather_weights", TIMES),
            ("reduce_grads", TIMES),
        ):
            if getattr(self, name) not in valid:
                raise InputError(f"unknown {name} {getattr(self, name)!r}; choose from: {', '.join(valid)}")
        if self.backend != "auto":
            get_backend(self.backend)
        self._check_mode()
        if self.max_tokens_per_chunk is not None and self.max_tokens_per_chunk < 1:
            raise InputError(f"max_tokens_per_chunk must be at least 1; got {self.max_tokens_per_chunk}")
        self._check_router_loss()
        if self.schedule != "bounded":
            for name, is_set in (
                ("max_tokens_per_chunk", self.max_tokens_per_chunk is not None),
                ("prefix_cache='cpu'", self.prefix_cache == "cpu"),
                ("gather_weights='step'", self.gather_weights == "step"),
            ):
                if is_set:
                    raise InputError(f"{name} goes with schedule 'bounded'; got schedule {self.schedule!r}")

    def _check_mode(self) -> None:
        if self.mode == "two_pass":
            return
        for what, is_set in (
            ("schedule 'bounded'", self.schedule == "bounded"),
            ("prefix_grad=False", not self.prefix_grad),
            ("checkpoint 'prefix'", self.checkpoint == "prefix"),
        ):
            if is_set:
                raise InputError(
                    f"{what} goes with mode 'two_pass', which keeps prefixes apart; got mode {self.mode!r}"
                )
        if self.mode == "padded" and self.backend != "auto":
            raise InputError(
                f"mode 'padded' runs the model's own attention (transformers' sdpa), so backend {self.backend!r} has "
                "no effect; leave backend at auto, or choose mode two_pass, one_pass or packed"
            )

    def _check_router_loss(self) -> None:
        coefficient = self.router_aux_loss_coef
        if coefficient is None:
            return
        if not 0 <= coefficient < float("inf"):
            raise InputError(f"router_aux_loss_coef must be a number of at least 0; got {coefficient}")
        if not self.prefix_grad:
            raise InputError(
                "router_aux_loss_coef is a loss of all tokens, and prefix_grad=False leaves prompts without gradient; "
                "leave one of them out"
            )

    @property
    def runs_chunks(self) -> bool:
        """Whether forward and backward run chunk by chunk, with keys and values as leaves."""
        return self.schedule == "bounded" or not self.prefix_grad

    @property
    def sharding(self) -> Sharding:
        """How the bounded schedule treats a sharded model."""
        return Sharding(gather_weights=self.gather_weights, reduce_grads=self.reduce_grads)

    @property
    def chunk_tokens(self) -> int | None:
        """Most tokens of a chunk; None for no bound."""
        if self.schedule != "bounded":
            return None
        return DEFAULT_MAX_TOKENS_PER_CHUNK if self.max_tokens_per_chunk is None else self.max_tokens_per_chunk


def with_changes(options: EngineOptions | None, changes: Mapping[str, Any]) -> EngineOptions:
    """Options (the defaults if None) with some fields set by name.

    Raises:
        InputError: If there is no such field, or the result does not fit together.
    """
    names = [item.name for item in fields(EngineOptions)]
    unknown = [name for name in changes if name not in names]
    if unknown:
        raise InputError(f"the engine has no option {unknown[0]!r}; it has: {', '.join(names)}")
    return replace(options or EngineOptions(), **changes)
