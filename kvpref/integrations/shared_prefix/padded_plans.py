"""Decide whether a padded batch is worth sharing, and plan it; the last decision is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kvpref.errors import InputError
from kvpref.integrations.shared_prefix.padded_rows import PaddedRows, SharedRows, UnservedError, share_rows
from kvpref.plan.batch import DEFAULT_MIN_SHARED_TOKENS
from kvpref.records.tensor_fields import tensors_to

# Each depth reads every depth above it with a block of its own.
_MAX_DEPTH = 4

_NAMES = ("input_ids", "attention_mask", "position_ids")
_Key = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, kw_only=True)
class SharingWorth:
    """How much a call must save for the pass over unique tokens to be faster than the model's own forward.

    The bars are where it surely was on one CPU core (`benchmarks/shared_prefix.py --only bars`; forward, and forward
    with backward), for a Llama of 4 layers, 256 wide: with 16 rows of 256 tokens it took 0.96 and 0.98 of the time
    where 5% were saved, 0.96 and 0.94 at 10%, 0.81 and 0.86 at 15%; with 4 rows of 64 tokens 1.05 and 0.98 where 57
    tokens were saved, 0.78 and 0.71 at 129.
    """

    min_saved: float = 0.15
    """Share of the call's tokens, padding included, that sharing must save."""

    min_saved_tokens: int = 128
    """Tokens that sharing must save: below, launching more kernels costs what it saves."""

    min_shared_tokens: int = DEFAULT_MIN_SHARED_TOKENS
    """Shorter shared prefixes are repeated in each row."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_saved < 1:
            raise InputError(f"min_saved must be at least 0 and less than 1; got {self.min_saved}")
        for name in ("min_saved_tokens", "min_shared_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")

    def check(self, num_shared: int, num_tokens: int) -> None:
        """Compare what is shared with the bars.

        Args:
            num_shared: Tokens that need not be repeated.
            num_tokens: Tokens of the call, padding included.

        Raises:
            UnservedError: If it is less.
        """
        if num_shared == 0:
            raise UnservedError("nothing shared")
        if num_shared < max(self.min_saved * num_tokens, self.min_saved_tokens):
            raise UnservedError("little shared")


class LastPlan:
    """Plans padded batches, and keeps the last plan: policy and reference often see one batch after the other.

    Args:
        model: Whose config says what positions mean.
        worth: When sharing is worth it.
    """

    def __init__(self, model: PreTrainedModel, worth: SharingWorth) -> None:
        self._worth = worth
        # Rotary embeddings read distances only, so rows that start in different columns can share. Learned positions
        # are what they are.
        self._by_position = getattr(model.config, "rope_parameters", None) is None
        self._key: _Key | None = None
        self._found: SharedRows | UnservedError | None = None

    def plan(self, arguments: dict[str, Any]) -> SharedRows:
        """The plan of a call, on its device.

        Raises:
            UnservedError: If its rows cannot be shared, or too little is shared.
        """
        device = arguments["input_ids"].device
        given = (arguments.get(name) for name in _NAMES)
        key = tuple(None if tensor is None else tensor.detach().cpu() for tensor in given)
        # Outside inference mode: tensors made inside cannot take part in a later backward pass.
        with torch.inference_mode(False):
            if self._key is None or not all(map(_same, self._key, key)):
                self._key = tuple(None if tensor is None else tensor.clone() for tensor in key)
                self._found = self._decide(self._key)
            if isinstance(self._found, UnservedError):
                raise UnservedError(*self._found.args)
            assert self._found is not None
            if self._found.unique_rows.device != device:
                self._found = tensors_to(self._found, device)
            return self._found

    def _decide(self, key: _Key) -> SharedRows | UnservedError:
        input_ids, attention_mask, position_ids = (None if tensor is None else tensor.numpy() for tensor in key)
        assert input_ids is not None
        try:
            rows = PaddedRows.read(input_ids.astype(np.int64, copy=False), attention_mask, position_ids)
            num_shared = rows.num_shared_tokens(by_position=self._by_position)
            self._worth.check(num_shared, input_ids.size)
            found = share_rows(
                rows,
                by_position=self._by_position,
                min_shared_tokens=self._worth.min_shared_tokens,
                max_depth=_MAX_DEPTH,
            )
            # Limits on the tree may have left less to share.
            self._worth.check(int(rows.lengths.sum()) - found.num_unique_tokens, input_ids.size)
        except UnservedError as unserved:
            return unserved
        return found


def _same(held: torch.Tensor | None, given: torch.Tensor | None) -> bool:
    if held is None or given is None:
        return held is given
    return held.dtype == given.dtype and torch.equal(held, given)
