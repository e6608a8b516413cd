"""Decides whether a padded batch is worth sharing, and plans it; keeps the last decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from kvpref.errors import InputError
from kvpref.integrations.shared_prefix.padded_rows import PaddedRows, SharedRows, UnservedError, share_rows
from kvpref.models.backbone import backbone
from kvpref.models.both_ways import both_ways_of
from kvpref.models.positions import reads_distances_only
from kvpref.models.temperature import counts_rows
from kvpref.models.vision.padded_call import image_arguments, pixel_inputs
from kvpref.models.vision.splitting import split_images
from kvpref.plan.sharing import DEFAULT_MIN_SHARED_TOKENS
from kvpref.records.images import PlacedImage
from kvpref.records.tensor_fields import tensors_to

# Each depth reads every depth above it in a separate block.
_MAX_DEPTH = 4

_NAMES = ("input_ids", "attention_mask", "position_ids")
_Tensors = tuple[torch.Tensor | None, ...]
_Images = list[tuple[PlacedImage, ...]]


class CallPlan(NamedTuple):
    """What a call runs: the plan, and the tower's inputs by image key."""

    shared: SharedRows
    image_inputs: dict[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class SharingWorth:
    """How much a call must save for the pass over unique tokens to be faster than the model's own forward.

    The thresholds are where it clearly was on one CPU core (`benchmarks/shared_prefix.py --only bars`; forward, forward
    with backward), for a Llama of 4 layers, 256 wide: with 16 rows of 256 tokens it took 0.96 and 0.98 of the time
    where 5% were saved, 0.96 and 0.94 at 10%, 0.81 and 0.86 at 15%; with 4 rows of 64 tokens 1.05 and 0.98 where 57
    tokens were saved, 0.78 and 0.71 at 129.
    """

    min_saved: float = 0.15
    """Share of the call's tokens, padding included, that sharing must save."""

    min_saved_tokens: int = 128
    """Tokens that sharing must save: below that, launching more kernels costs what it saves."""

    min_shared_tokens: int = DEFAULT_MIN_SHARED_TOKENS
    """Shorter shared prefixes are repeated in each row."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_saved < 1:
            raise InputError(f"min_saved must be at least 0 and less than 1; got {self.min_saved}")
        for name in ("min_saved_tokens", "min_shared_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")

    def check(self, num_shared: int, num_tokens: int) -> None:
        """Compare what is shared with the thresholds.

        Args:
            num_shared: Tokens that need not be repeated.
            num_tokens: Tokens of the call, padding included.

        Raises:
            UnservedError: If too little is shared.
        """
        if num_shared == 0:
            raise UnservedError("nothing shared")
        if num_shared < max(self.min_saved * num_tokens, self.min_saved_tokens):
            raise UnservedError("little shared")


class LastPlan:
    """Plans padded batches, and keeps the last plan: policy and reference often see the same batch in turn.

    Args:
        model: The model, whose config says what positions mean.
        worth: Decides when sharing pays.
    """

    def __init__(self, model: PreTrainedModel, worth: SharingWorth) -> None:
        self._model, self._worth = model, worth
        # Most rotary embeddings read only distances, so rows that start in different columns can share. Learned
        # positions cannot.
        self._by_position = not reads_distances_only(model.config)
        self._counts_padding = counts_rows(model)
        self._spans = both_ways_of(model.config).spans
        self._key: tuple[_Tensors, list[list[str]]] | None = None
        self._found: SharedRows | UnservedError | None = None

    def plan(self, arguments: dict[str, Any]) -> CallPlan:
        """The plan of a call, on its device.

        Raises:
            UnservedError: If its rows cannot be shared, or too little is shared.
        """
        device = arguments["input_ids"].device
        given = (arguments.get(name) for name in _NAMES)
        tensors = tuple(None if tensor is None else tensor.detach().cpu() for tensor in given)
        # Outside inference mode: tensors made inside cannot take part in a later backward pass.
        with torch.inference_mode(False):
            images = self._images(arguments, tensors)
            keys = [[placed.image.key for placed in row] for row in images]
            if not self._is_known(tensors, keys):
                self._key = tuple(None if tensor is None else tensor.clone() for tensor in tensors), keys
                self._found = self._decide(self._key[0], images)
            if isinstance(self._found, UnservedError):
                raise UnservedError(*self._found.args)
            assert self._found is not None
            if self._found.unique_rows.device != device:
                self._found = tensors_to(self._found, device)
        return CallPlan(self._found, {placed.image.key: placed.image.read() for row in images for placed in row})

    def _is_known(self, tensors: _Tensors, keys: list[list[str]]) -> bool:
        return self._key is not None and keys == self._key[1] and all(map(_same, self._key[0], tensors))

    def _images(self, arguments: dict[str, Any], tensors: _Tensors) -> _Images:
        """The images of each row; empty if the call has none."""
        about_images = {name: arguments.get(name) for name in image_arguments(self._model)}
        try:
            pixels = pixel_inputs(self._model, about_images, arguments["input_ids"], arguments.get("attention_mask"))
            if not pixels:
                return []
            if arguments.get("position_ids") is not None and hasattr(backbone(self._model), "get_rope_index"):
                raise UnservedError("position_ids beside images")
            return split_images(self._model, _read(tensors).token_ids(), pixels)
        except InputError:
            raise UnservedError("images that are not those of the placeholders") from None

    def _decide(self, tensors: _Tensors, images: _Images) -> SharedRows | UnservedError:
        try:
            rows = _read(tensors).with_images(images)
            if self._counts_padding and rows.starts.any():
                raise UnservedError("padding that layers count")
            num_shared = rows.num_shared_tokens(by_position=self._by_position)
            self._worth.check(num_shared, rows.input_ids.size)
            found = share_rows(
                rows,
                by_position=self._by_position,
                min_shared_tokens=self._worth.min_shared_tokens,
                max_depth=_MAX_DEPTH,
                spans=self._spans,
            )
            # Limits on the tree may leave less to share.
            self._worth.check(int(rows.lengths.sum()) - found.num_unique_tokens, rows.input_ids.size)
        except UnservedError as unserved:
            return unserved
        return found


def _read(tensors: _Tensors) -> PaddedRows:
    input_ids, attention_mask, position_ids = (None if tensor is None else tensor.numpy() for tensor in tensors)
    assert input_ids is not None
    return PaddedRows.read(input_ids.astype(np.int64, copy=False), attention_mask, position_ids)


def _same(held: torch.Tensor | None, given: torch.Tensor | None) -> bool:
    if held is None or given is None:
        return held is given
    return held.dtype == given.dtype and torch.equal(held, given)
