"""A running pass: what its layers read and leave, and how they find it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn

from kvpref.errors import UnsupportedModelError
from kvpref.models.both_ways import NOWHERE, BothWays
from kvpref.models.mixers.passes import PassMixers
from kvpref.models.record import AttentionCall, is_recording, note_call
from kvpref.ops.attention import AttentionParams, CascadePlan, cascade_attention
from kvpref.plan.passes import PassPlan
from kvpref.prefix.rules import Rule
from kvpref.state.cache import KeyValues, LayerSlot

_active: ContextVar[RunningPass | None] = ContextVar("kvpref_active_pass", default=None)


class HeadExchange(Protocol):
    """Ranks that each run a share of a pass's rows, and compute a share of the heads for all rows.

    Shape legend: R rows of this rank, T of all, N ranks, H heads, G key/value heads.
    """

    def to_heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(R, H, D), (R, G, D), (R, G, E) -> (T, H / N, D), (T, G / N, D), (T, G / N, E), with T `num_rows`."""

    def to_rows(self, out: torch.Tensor) -> torch.Tensor:
        """(T, H / N, E) -> (R, H, E)."""

    def own_heads(self, per_head: torch.Tensor) -> torch.Tensor:
        """(H,) -> (H / N,)."""


class RunningPass:
    """One pass while it runs and, under gradient checkpointing, while its layers are recomputed.

    Opaque to pytrees on purpose: FSDP maps over keyword arguments and would copy a list or a dict per layer.

    Attributes:
        both_ways: Which of its tokens see later ones.
        mixers: The states its recurrent and convolution layers start from and leave.

    Args:
        plan: The pass as planned.
        key_values: Keys and values that earlier passes left; this pass adds its own if `keep` is set.
        max_calls: An upper bound on its attention calls.
        num_positions: Length of the longest sequence in the batch, in tokens.
        backend: Name of the attention backend, or ``auto``.
        keep: Whether later passes will read this pass's keys and values.
        both_ways: Which tokens of the model see later ones.
        exchange: The ranks that run its rows; the plan's tokens are then this rank's share, while its blocks cover the
            whole pass. None if this rank runs all rows.
    """

    def __init__(
        self,
        plan: PassPlan,
        key_values: KeyValues,
        *,
        max_calls: int,
        num_positions: int,
        backend: str,
        keep: bool,
        both_ways: BothWays = NOWHERE,
        exchange: HeadExchange | None = None,
    ) -> None:
        has_spans = any(layout.spans for layout in plan.layouts)
        self.both_ways = both_ways if has_spans else NOWHERE
        self.plan, self.num_positions, self.backend, self.keep = plan, num_positions, backend, keep
        self.exchange = exchange
        self._key_values = key_values
        self.mixers = PassMixers(plan.segments, key_values.recurrent.before())
        self._slots = key_values.slots(max_calls)
        self._next_slot = self._slots[0]
        # For recomputation: which module took each slot.
        self._slots_of: dict[nn.Module, list[LayerSlot]] | None = None
        self._replays = False

    def finish(self) -> list[nn.Module]:
        """Close the pass: check that the layers of earlier passes took part, and store what they leave.

        Returns:
            The modules that attended, call after call, and the mixers that ran.

        Raises:
            UnsupportedModelError: If no layer took part, or not the same ones as in the pass before.
        """
        taken = [slot for slot in self._slots if slot.module is not None]
        mixers, states = self.mixers.finish()
        if not (taken or mixers) or not self._key_values.same_layers(taken):
            raise UnsupportedModelError(
                f"{len(taken)} attention calls ran through kvpref, but not those of the pass before; this model routes "
                "attention in a way kvpref does not follow"
                if taken
                else "no attention layer ran through kvpref; this model does not route attention through "
                "transformers' attention interface"
            )
        modules: list[nn.Module] = []
        self._slots_of = {}
        for slot in taken:
            assert slot.module is not None
            modules.append(slot.module)
            self._slots_of.setdefault(slot.module, []).append(slot)
        if self.keep:
            self._key_values.record(taken)
            self._key_values.recurrent.record(states)
        return [*modules, *mixers]

    def enter(self, module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> LayerSlot:
        """The slot of the current attention call.

        Raises:
            UnsupportedModelError: If it is not known which call this is.
        """
        if self._slots_of is not None and not self._replays:
            # A checkpoint that does not know the pass recomputes this layer.
            slots = self._slots_of[module]
            if len(slots) > 1:
                raise UnsupportedModelError(
                    f"{type(module).__name__} attends more than once in a pass and is recomputed by a "
                    "checkpoint other than transformers' own; use gradient_checkpointing_enable, or checkpoint='all'"
                )
            return slots[0]
        slot = self._next_slot
        if slot.following is None:
            raise UnsupportedModelError(
                f"more than {len(self._slots)} attention calls in one pass, or more than in the pass before; this "
                "model routes attention in a way kvpref does not follow"
            )
        self._next_slot = slot.following
        if self._slots_of is None:  # else the layer only reads, and must not write again
            slot.module = module
            if self.keep:
                slot.leave(key, value)
        return slot

    @property
    def place(self) -> LayerSlot:
        """The next attention call, to which `recomputed_from` can take the pass back."""
        return self._next_slot

    @contextmanager
    def recomputed_from(self, place: LayerSlot) -> Iterator[None]:
        """Take the pass back to `place`, where the first layer began, while a checkpoint recomputes layers."""
        before = self._next_slot, self._replays
        self._next_slot, self._replays = place, True
        try:
            with bind_pass(self):
                yield
        finally:
            self._next_slot, self._replays = before


class LayersPass:
    """The running pass as layers of one kind see it, returned by the mask function and passed to attention calls.

    Args:
        running: The pass.
        rule: Which keys a query of these layers sees.
    """

    def __init__(self, running: RunningPass, rule: Rule) -> None:
        self.running, self.rule = running, rule
        self.levels = running.plan.levels_under(rule)

    def __getitem__(self, places: tuple[slice, ...]) -> LayersPass:
        """The pass itself, unsliced: some models slice their masks even if nothing is cut off (Gemma 4).

        Raises:
            UnsupportedModelError: If something is cut off.
        """
        if any(place not in (slice(None), slice(0, None)) for place in places):
            raise UnsupportedModelError(f"the model cuts rows or columns off its attention mask ({places})")
        return self

    def __getattr__(self, name: str) -> Any:
        """Refuse models that compute with their masks as tensors.

        Raises:
            UnsupportedModelError: If a tensor has this attribute.
        """
        if not name.startswith("__") and hasattr(torch.Tensor, name):
            raise UnsupportedModelError(
                f"the model computes with its attention masks (asks for {name!r}), so kvpref cannot say what its "
                "layers see"
            )
        raise AttributeError(name)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        params: AttentionParams,
        sink: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of this pass's rows over themselves and over the prefixes they continue.

        Args:
            module: The layer's attention.
            query: (T, H, D).
            key: (T, G, D).
            value: (T, G, E).
            params: Scale and softcap of the layer.
            sink: (H,) an extra logit of every row.

        Returns:
            (T, H, E).
        """
        running = self.running
        self._note(module, query, key, value, params, sink)
        exchange = running.exchange
        if exchange is not None:
            num_rows = sum(level.num_rows for level in self.levels)
            query, key, value = exchange.to_heads(query, key, value, num_rows)
            sink = None if sink is None else exchange.own_heads(sink)
        if running.keep:
            # One copy for this pass's own attention and for the passes that follow.
            key, value = key.contiguous(), value.contiguous()
        prefixes = running.enter(module, key, value).read()
        outs: list[torch.Tensor] = []
        for level, q, k, v in zip(self.levels, *map(self._split, (query, key, value)), strict=True):
            plan = CascadePlan(blocks=level.blocks, params=params, backend=running.backend)
            outs.append(cascade_attention(q, k, v, prefixes, plan, sink))
            prefixes = (*prefixes, (k, v))  # mode one_pass: later levels of the row see earlier ones
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out if exchange is None else exchange.to_rows(out)

    def _note(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        params: AttentionParams,
        sink: torch.Tensor | None,
    ) -> None:
        # Traced code cannot look up a record.
        if torch.compiler.is_compiling() or not is_recording():
            return
        note_call(
            AttentionCall(
                module=module,
                rule=self.rule,
                params=params,
                has_sink=sink is not None,
                num_heads=query.shape[1],
                num_kv_heads=key.shape[1],
                head_dim=key.shape[2],
                value_dim=value.shape[2],
            )
        )

    def _split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows of each level."""
        # Autograd would copy the gradient of a split, even if there is only one part.
        return (tensor,) if len(self.levels) == 1 else tensor.split([level.num_rows for level in self.levels])


def current_pass() -> RunningPass | None:
    """The pass whose layers are running or being recomputed; None outside."""
    return _active.get()


@contextmanager
def bind_pass(running: RunningPass) -> Iterator[None]:
    """Let the layers that run inside find the pass."""
    token = _active.set(running)
    try:
        yield
    finally:
        _active.reset(token)
