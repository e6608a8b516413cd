"""A pass while it runs: what its layers read and leave, and how they find it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

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


class RunningPass:
    """One pass while it runs and, under gradient checkpointing, while its layers are recomputed.

    Opaque to pytrees on purpose: FSDP maps over keyword arguments and would copy a list or a dict per layer.

    Attributes:
        both_ways: Which of its tokens see later ones.
        mixers: What its recurrent and convolution layers begin with, and leave.

    Args:
        plan: Blocks of the pass.
        key_values: What earlier passes left; this pass adds its own when `keep` is set.
        max_calls: More attention calls than any model of this size makes.
        num_positions: Length of the longest sequence in the batch, in tokens.
        backend: Name of the attention backend, or ``auto``.
        keep: Whether later passes will read this pass's keys and values.
        both_ways: Which tokens of the model see later ones.
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
    ) -> None:
        has_spans = any(layout.spans for layout in plan.layouts)
        self.both_ways = both_ways if has_spans else NOWHERE
        self.plan, self.num_positions, self.backend, self.keep = plan, num_positions, backend, keep
        self._key_values = key_values
        self.mixers = PassMixers(plan.segments, key_values.recurrent.before())
        self._slots = key_values.slots(max_calls)
        self._next_slot = self._slots[0]
        # Where a layer is recomputed: by whom a slot was taken.
        self._slots_of: dict[nn.Module, list[LayerSlot]] | None = None
        self._replays = False

    def finish(self) -> list[nn.Module]:
        """Close the pass: check that the layers of the passes before took part, and hand over what these leave.

        Returns:
            The modules that attended, call after call, and the mixers that ran.

        Raises:
            UnsupportedModelError: If no layer came through, or not those of the pass before.
        """
        taken = [slot for slot in self._slots if slot.module is not None]
        mixers, states = self.mixers.finish()
        if not (taken or mixers) or not self._key_values.same_layers(taken):
            raise UnsupportedModelError(
                f"{len(taken)} attention calls ran through kvpref, and not those of the pass before; this model routes "
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
        """The slot of an attention call that is made now.

        Raises:
            UnsupportedModelError: If it is not known which call is made.
        """
        if self._slots_of is not None and not self._replays:
            # A checkpoint that was not told of the pass recomputes this layer.
            slots = self._slots_of[module]
            if len(slots) > 1:
                raise UnsupportedModelError(
                    f"{type(module).__name__} attends more than once in a pass and is recomputed by a checkpoint of "
                    "another kind than transformers' own; use gradient_checkpointing_enable, or checkpoint='all'"
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
        """The next attention call, which `recomputed_from` takes the pass back to."""
        return self._next_slot

    @contextmanager
    def recomputed_from(self, place: LayerSlot) -> Iterator[None]:
        """While a checkpoint recomputes layers, of which the first had `place` before it ran."""
        before = self._next_slot, self._replays
        self._next_slot, self._replays = place, True
        try:
            with bind_pass(self):
                yield
        finally:
            self._next_slot, self._replays = before


class LayersPass:
    """The running pass as layers of one kind see it: what the mask function returns, and attention calls are given.

    Args:
        running: The pass.
        rule: Which keys a query of these layers sees.
    """

    def __init__(self, running: RunningPass, rule: Rule) -> None:
        self.running, self.rule = running, rule
        self.levels = running.plan.levels_under(rule)

    def __getitem__(self, places: tuple[slice, ...]) -> LayersPass:
        """All of it: some models slice their masks, also where nothing is cut off (Gemma 4).

        Raises:
            UnsupportedModelError: If something is.
        """
        if any(place not in (slice(None), slice(0, None)) for place in places):
            raise UnsupportedModelError(f"the model cuts rows or columns off its attention mask ({places})")
        return self

    def __getattr__(self, name: str) -> Any:
        """A tensor's attribute, say, of a model that computes with its masks.

        Raises:
            UnsupportedModelError: If a tensor would have it.
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
            params: Numbers of the layer.
            sink: (H,) one more logit of every row.

        Returns:
            (T, H, E).
        """
        running = self.running
        self._note(module, query, key, value, params, sink)
        if running.keep:
            # One copy for this pass's own attention and for the passes that follow.
            key, value = key.contiguous(), value.contiguous()
        prefixes = running.enter(module, key, value).read()
        outs: list[torch.Tensor] = []
        for level, q, k, v in zip(self.levels, *map(self._split, (query, key, value)), strict=True):
            plan = CascadePlan(blocks=level.blocks, params=params, backend=running.backend)
            outs.append(cascade_attention(q, k, v, prefixes, plan, sink))
            prefixes = (*prefixes, (k, v))  # mode one_pass: later levels of the row see earlier ones
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _note(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        params: AttentionParams,
        sink: torch.Tensor | None,
    ) -> None:
        # What is traced cannot look for a record.
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
        # Autograd would copy the gradient of a split, even of one into a single part.
        return (tensor,) if len(self.levels) == 1 else tensor.split([level.num_rows for level in self.levels])


def current_pass() -> RunningPass | None:
    """The pass whose layers run now, or are recomputed now; None outside."""
    return _active.get()


@contextmanager
def bind_pass(running: RunningPass) -> Iterator[None]:
    """Let the layers that run inside find the pass."""
    token = _active.set(running)
    try:
        yield
    finally:
        _active.reset(token)
