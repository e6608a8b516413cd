"""The attention function and the mask function that `attach` registers with transformers.

How a pass reaches the layers: the mask function is the one place where every model asks for something per forward and
hands the answer to every attention call, also when a checkpoint recomputes a layer, also in models that drop unknown
keyword arguments. So the mask *is* the pass: `bind_pass` holds it only while the model builds its masks, the mask
function returns it, and from there it travels as the `attention_mask` argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpref.errors import UnsupportedModelError
from kvpref.models.masks import MaskFunction, require_causal
from kvpref.ops.attention import AttentionParams, CascadePlan, cascade_attention
from kvpref.plan.passes import PassPlan
from kvpref.state.cache import KeyValues, LayerSlot

ATTENTION_NAME = "kvpref"

# Keyword arguments of attention calls that do not change what a causal layer computes. `sliding_window` is not the
# truth about the window: the mask function is, and it has been read.
_HARMLESS_KWARGS = frozenset(
    {"position_ids", "cache_position", "use_cache", "sliding_window", "is_causal", "output_attentions"}
)

_active_pass: ContextVar[RunningPass | None] = ContextVar("kvpref_active_pass", default=None)


class RunningPass:
    """One pass while it runs and, under gradient checkpointing, while its layers are recomputed.

    Opaque to pytrees on purpose: FSDP maps over keyword arguments and would copy a list or a dict per layer.

    Args:
        plan: Blocks of the pass.
        key_values: What earlier passes left; this pass adds its own when `keep` is set.
        num_layers: Attention layers of the model.
        num_positions: Length of the longest sequence in the batch, in tokens.
        backend: Name of the attention backend, or ``auto``.
        keep: Whether later passes will read this pass's keys and values.
    """

    def __init__(
        self, plan: PassPlan, key_values: KeyValues, *, num_layers: int, num_positions: int, backend: str, keep: bool
    ) -> None:
        self.plan, self.num_positions, self.backend, self.keep = plan, num_positions, backend, keep
        self._key_values = key_values
        self._slots = key_values.slots(num_layers)
        self._next_slot = self._slots[0]
        self._slot_of: dict[nn.Module, LayerSlot] | None = None

    def finish(self) -> None:
        """Close the pass: check that every attention layer took part exactly once, and hand over what they leave.

        Raises:
            UnsupportedModelError: If a layer did not come through, or came more than once.
        """
        slot_of = {slot.module: slot for slot in self._slots if slot.module is not None}
        if len(slot_of) != len(self._slots) or not self._key_values.same_layers(self._slots):
            num_calls = sum(slot.module is not None for slot in self._slots)
            raise UnsupportedModelError(
                f"{len(slot_of)} attention layers ran through kvpref ({num_calls} calls) where the model has "
                f"{len(self._slots)}, or they ran in another order than in the pass before; this model routes "
                "attention in a way kvpref does not follow"
            )
        self._slot_of = slot_of
        if self.keep:
            self._key_values.record(self._slots)

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of this pass's rows over themselves and over the prefixes they continue.

        Args:
            query: (T, H, D). key, value: (T, G, D).

        Returns:
            (T, H, D).
        """
        if self.keep:
            # One copy for this pass's own attention and for the passes that follow.
            key, value = key.contiguous(), value.contiguous()
        prefixes = self._enter(module, key, value).read()
        outs: list[torch.Tensor] = []
        for level, q, k, v in zip(self.plan.levels, *map(self._split, (query, key, value)), strict=True):
            plan = CascadePlan(blocks=level.blocks, params=AttentionParams(scale=scale), backend=self.backend)
            outs.append(cascade_attention(q, k, v, prefixes, plan))
            prefixes = (*prefixes, (k, v))  # mode one_pass: later levels of the row see earlier ones
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows of each level."""
        levels = self.plan.levels
        # Autograd would copy the gradient of a split, even of one into a single part.
        return (tensor,) if len(levels) == 1 else tensor.split([level.num_rows for level in levels])

    def _enter(self, module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> LayerSlot:
        """The slot of a layer that attends now."""
        if self._slot_of is not None:  # a checkpoint recomputes this layer: it reads, and must not write again
            return self._slot_of[module]
        slot = self._next_slot
        if slot.following is None:
            raise UnsupportedModelError(
                f"more attention calls than the model's {len(self._slots)} layers; this model routes attention in a "
                "way kvpref does not follow"
            )
        self._next_slot = slot.following
        slot.module = module
        if self.keep:
            slot.leave(key, value)
        return slot


@contextmanager
def bind_pass(running: RunningPass) -> Iterator[None]:
    """Let the masks that the model builds inside carry `running` to its attention layers."""
    token = _active_pass.set(running)
    try:
        yield
    finally:
        _active_pass.reset(token)


def register() -> None:
    """Make both functions known to transformers under `ATTENTION_NAME`; idempotent."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention_function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, mask_function)


def mask_function(*args: Any, **kwargs: Any) -> RunningPass | torch.Tensor | None:
    """The running pass, once its mask is known to be causal; outside a pass, the mask that `sdpa` would get."""
    running = _active_pass.get()
    if running is None:
        mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
        return mask
    model_mask: MaskFunction = kwargs.get("mask_function", causal_mask_function)
    require_causal(model_mask, running.num_positions)
    return running


def attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: RunningPass | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers models: cascade inside a pass, `sdpa` outside.

    Args:
        query: (B, H, T, D); key, value: (B, G, T, D). B is 1 inside a pass.
        attention_mask: What `mask_function` returned.

    Returns:
        (B, T, H, D) and None in place of attention weights.

    Raises:
        UnsupportedModelError: If the layer asks for something that would change the result: dropout, or a keyword
            argument that kvpref does not know.
    """
    if not isinstance(attention_mask, RunningPass):
        sdpa: Callable[..., tuple[torch.Tensor, None]] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if dropout > 0:
        raise UnsupportedModelError(
            f"attention dropout {dropout} makes two forwards differ; set attention_dropout (attn_pdrop) to 0"
        )
    unknown = [name for name, given in kwargs.items() if given is not None and name not in _HARMLESS_KWARGS]
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to attention, which kvpref does not know"
        )
    if torch.is_autocast_enabled(query.device.type):
        # The same cast that autocast applies to scaled_dot_product_attention.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention_mask.attend(module, q, k, v, scale).unsqueeze(0), None
