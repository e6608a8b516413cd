"""`PrefixCache`: keys and values of the segments already encoded, one contiguous slab per depth and layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from kvpref.errors import InputError
from kvpref.plan.passes import ModePlan, PassPlan
from kvpref.state.image_features import ImageFeatures
from kvpref.state.recurrent import HeldStates, RecurrentStates
from kvpref.tracing import mark

KeyValue = tuple[torch.Tensor, torch.Tensor]


class LayerSlot:
    """One attention call's place in a running pass: what it reads, and what it leaves.

    Most layers make one call. Slots are chained and handed out in the order of the calls. Looking a layer up by its
    identity or number would make torch.compile specialise on it, and compile every layer separately.

    Attributes:
        following: The next layer's slot. The last layer's slot is followed by an end that belongs to no layer, so that
            the last layer looks like the others.
        module: The attention module that took the slot.
        own: The keys and values of this pass.
    """

    def __init__(self, prefixes: tuple[KeyValue, ...], following: LayerSlot | None) -> None:
        self.following = following
        self.module: nn.Module | None = None
        self.own: KeyValue | None = None
        self._prefixes = prefixes

    def read(self) -> tuple[KeyValue, ...]:
        """Keys and values of earlier passes, (rows, num_kv_heads, head_dim) each, one pair per cross block."""
        return self._prefixes

    def leave(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the keys and values of this pass, before its own attention reads them."""
        self.own = (key, value)


class KeyValues(Protocol):
    """Where a running pass finds the keys and values that it reads, and leaves its own."""

    @property
    def recurrent(self) -> RecurrentStates:
        """The same for the states of mixers."""

    def slots(self, max_calls: int) -> list[LayerSlot]:
        """The chained slots of the next pass, one per attention call; `max_calls` if their number is unknown."""

    def same_layers(self, slots: Sequence[LayerSlot]) -> bool:
        """Whether the same attention modules took slots as in earlier passes, in the same order."""

    def record(self, slots: Sequence[LayerSlot]) -> None:
        """Store the keys and values that a pass left in its slots."""


def chain_slots(prefixes: Sequence[tuple[KeyValue, ...]]) -> list[LayerSlot]:
    """Slots whose layers read `prefixes`, one tuple per layer."""
    chain = [LayerSlot((), None)]
    for pairs in reversed(prefixes):
        chain.append(LayerSlot(pairs, chain[-1]))
    return chain[:0:-1]


class PrefixCacheLayer(CacheLayerMixin):
    """The slabs of one attention call: per depth d, keys (after RoPE) and values, (T_d, num_kv_heads, head_dim)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.slabs: list[KeyValue] = []

    def get_seq_length(self) -> int:
        """Unique prefix tokens held, over all depths."""
        return sum(key.shape[0] for key, _ in self.slabs)

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError(_READ_ONLY)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError(_READ_ONLY)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError(_READ_ONLY)


_READ_ONLY = (
    "a PrefixCache is filled by kvpref.encode_prefix and read by kvpref.score_responses; "
    "it cannot be passed to a model as past_key_values"
)


class PrefixCache(Cache):
    """The prefix cache of one micro-batch: what pass 1 leaves for the passes that follow.

    Keys and values stay in the autograd graph, so gradients of the responses flow back through the prompts.

    Attributes:
        layers: One `PrefixCacheLayer` per attention call, in the order of the calls.
        passes: The passes run so far.
        predictor_hidden: Per pass run so far, the hidden states (P_i, hidden_size) that predict scored tokens.
        recurrent: The states that the mixers of the last pass left.
        image_features: The features of all images of the batch; None before the tower has run, or without images.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.image_features: ImageFeatures | None = None
        self.recurrent = HeldStates()
        self.passes: list[PassPlan] = []
        self.predictor_hidden: list[torch.Tensor] = []
        self._model: nn.Module | None = None

    layers: list[PrefixCacheLayer]  # type: ignore[assignment]

    @property
    def num_passes(self) -> int:
        """Number of passes that have run."""
        return len(self.passes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys, values and recurrent states held."""
        own = sum(tensor.nbytes for layer in self.layers for slab in layer.slabs for tensor in slab)
        return own + self.recurrent.num_bytes

    def claim(self, model: nn.Module) -> None:
        """Tie this cache to the model that fills it.

        Raises:
            InputError: If another model has filled it.
        """
        if self._model not in (None, model):
            raise InputError("the prefix cache was made by another model; encode the prefix with this one")
        self._model = model

    def slots(self, max_calls: int) -> list[LayerSlot]:
        """The slots of the next pass; each call reads its own slabs, one per pass so far."""
        return chain_slots([tuple(layer.slabs) for layer in self.layers] or [()] * max_calls)

    def same_layers(self, slots: Sequence[LayerSlot]) -> bool:
        """Whether the slots were taken by the attention modules that filled this cache, in the same order."""
        return not self.layers or [layer.module for layer in self.layers] == [slot.module for slot in slots]

    def record(self, slots: Sequence[LayerSlot]) -> None:
        """Append the slabs that a pass left in its slots."""
        if not self.layers:
            self.layers = [PrefixCacheLayer(slot.module) for slot in slots if slot.module is not None]
        for layer, slot in zip(self.layers, slots, strict=True):
            assert slot.own is not None
            layer.slabs.append(slot.own)
            mark("prefix K/V", *slot.own)

    def close_pass(self, item: PassPlan, hidden: torch.Tensor) -> None:
        """Note that a pass has run.

        Args:
            item: The pass.
            hidden: (P_i, hidden_size), its hidden states that predict scored tokens.
        """
        self.passes.append(item)
        self.predictor_hidden.append(hidden)

    def begins(self, plan: ModePlan) -> bool:
        """Whether the passes held are the first ones of `plan`: the same tokens, positions and predictor rows."""
        return 0 < self.num_passes <= len(plan.passes) and all(
            held is own
            or (
                not held.image_rows.numel()  # tokens do not distinguish images
                and torch.equal(held.input_ids, own.input_ids)
                and torch.equal(held.position_ids, own.position_ids)
                and torch.equal(held.predictor_rows, own.predictor_rows)
            )
            for held, own in zip(self.passes, plan.passes, strict=False)
        )

    def fork(self) -> PrefixCache:
        """A cache with the same slabs (not copied) that can grow without changing this one."""
        forked = PrefixCache()
        forked.passes = list(self.passes)
        forked.predictor_hidden = list(self.predictor_hidden)
        forked._model, forked.image_features = self._model, self.image_features
        forked.recurrent.record(self.recurrent.before())
        for layer in self.layers:
            forked.layers.append(PrefixCacheLayer(layer.module))
            forked.layers[-1].slabs = list(layer.slabs)
        return forked
