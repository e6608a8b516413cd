"""`PrefixCache`: keys and values of the segments already encoded, one contiguous slab per depth and layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from kvpref.errors import InputError
from kvpref.plans import ModePlan, PassPlan

KeyValue = tuple[torch.Tensor, torch.Tensor]


class PrefixCacheLayer(CacheLayerMixin):
    """One layer's slabs: per depth d, keys and values of shape (T_d, num_kv_heads, head_dim), keys after RoPE."""

    def __init__(self) -> None:
        super().__init__()
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
        layers: One `PrefixCacheLayer` per attention module, in the order in which they ran.
        passes: The passes run so far.
        predictor_hidden: Per pass run so far, the hidden states (P_i, hidden_size) that predict scored tokens.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.passes: list[PassPlan] = []
        self.predictor_hidden: list[torch.Tensor] = []
        self._layer_of: dict[nn.Module, PrefixCacheLayer] = {}

    layers: list[PrefixCacheLayer]  # type: ignore[assignment]

    @property
    def num_passes(self) -> int:
        """Passes that have run."""
        return len(self.passes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values held."""
        return sum(tensor.nbytes for layer in self.layers for slab in layer.slabs for tensor in slab)

    def record(self, module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        """Append the slab of one pass for one attention module.

        Args:
            module: The attention module that computed them.
            key: (T_d, num_kv_heads, head_dim), after RoPE, contiguous.
            value: (T_d, num_kv_heads, head_dim), contiguous.
        """
        if module not in self._layer_of:
            self._layer_of[module] = PrefixCacheLayer()
            self.layers.append(self._layer_of[module])
        self._layer_of[module].slabs.append((key, value))

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
                torch.equal(held.input_ids, own.input_ids)
                and torch.equal(held.position_ids, own.position_ids)
                and torch.equal(held.predictor_rows, own.predictor_rows)
            )
            for held, own in zip(self.passes, plan.passes, strict=False)
        )

    def prefixes(self, module: nn.Module, num_depths: int) -> list[KeyValue]:
        """The slabs of the first `num_depths` depths for one attention module."""
        if num_depths == 0:
            return []
        if module not in self._layer_of:
            raise InputError("the prefix cache was made by another model; encode the prefix with this one")
        return self._layer_of[module].slabs[:num_depths]

    def fork(self) -> PrefixCache:
        """A cache with the same slabs (not copied) that can grow without changing this one."""
        forked = PrefixCache()
        forked.passes = list(self.passes)
        forked.predictor_hidden = list(self.predictor_hidden)
        for module, layer in self._layer_of.items():
            for key, value in layer.slabs:
                forked.record(module, key, value)
        return forked
