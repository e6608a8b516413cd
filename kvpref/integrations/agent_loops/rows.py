"""Padded rows with a mask of the tokens that the policy wrote, as used by loops such as verl's.

Shape legend: B rows of L columns, the last R of which may hold responses; S response tokens over all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvpref.errors import InputError
from kvpref.integrations.padded_sequences import check_positions, padded_sequences, token_mask
from kvpref.plan.batch import Batch, collate
from kvpref.records.groups import Group

_NEEDED = ("input_ids", "attention_mask", "response_mask")
_OF_IMAGES = ("multi_modal_inputs", "pixel_values", "pixel_values_videos")


@dataclass(frozen=True, kw_only=True, eq=False)
class ResponseRows:
    """The rows as a batch in which shared prefixes are found, and the mapping back to rows."""

    batch: Batch
    """One group, one sequence per row."""

    scored: torch.Tensor
    """(B, R) bool: the response tokens."""

    @classmethod
    def read(cls, rows: Any, min_shared_tokens: int) -> ResponseRows:
        """Check the rows and find what they share.

        Args:
            rows: As in `kvpref.tree_logps`.
            min_shared_tokens: As in `kvpref.collate`.

        Raises:
            InputError: If the rows are inconsistent or unsupported; the message names the row.
        """
        input_ids, attention_mask, response_mask = _needed(rows)
        mask = token_mask(input_ids, _flags("attention_mask", attention_mask))
        _check_others(rows, mask)
        response = _flags("response_mask", response_mask)
        scored = torch.zeros_like(mask)
        scored[:, scored.shape[1] - response.shape[1] :] = response
        stray = (scored & ~mask).any(dim=1)
        if bool(stray.any()):
            row = int(stray.nonzero()[0])
            raise InputError(f"row {row} has ones in response_mask where its attention_mask is 0; mask padding out")
        sequences = padded_sequences(input_ids, mask, scored)
        batch = collate([Group(sequences)], device=input_ids.device, min_shared_tokens=min_shared_tokens)
        return cls(batch=batch, scored=response)

    def pad(self, values: torch.Tensor) -> torch.Tensor:
        """Spread (S,) values of response tokens to (B, R), 0 elsewhere; with their gradient."""
        # Stays in the graph even without response tokens, so that a backward pass has one.
        return values.new_zeros(self.scored.shape).masked_scatter(self.scored, values)


def _needed(rows: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    given = _names(rows)
    missing = [name for name in _NEEDED if name not in given]
    if missing:
        raise InputError(
            f"rows must have {', '.join(_NEEDED)}; {', '.join(missing)} missing, found {', '.join(given) or 'nothing'}"
        )
    input_ids, attention_mask, response_mask = (rows[name] for name in _NEEDED)
    for name, values in zip(_NEEDED, (input_ids, attention_mask, response_mask), strict=True):
        if not isinstance(values, torch.Tensor) or values.is_nested or values.ndim != 2 or not values.numel():
            raise InputError(f"{name} must be a padded tensor of rows and columns; got {_what(values)}")
    if input_ids.dtype != torch.int64:
        raise InputError(f"input_ids must be int64; got {input_ids.dtype}")
    (num_rows, width), (num_masks, response_width) = input_ids.shape, response_mask.shape
    if num_masks != num_rows or response_width > width:
        raise InputError(
            f"response_mask must have the shape of input_ids, {num_rows} x {width}, or cover only the "
            f"last columns; got {num_masks} x {response_width}"
        )
    return input_ids, attention_mask, response_mask


def _check_others(rows: Any, mask: torch.Tensor) -> None:
    """Refuse inputs that would change log-probs but are not read."""
    given = _names(rows)
    images = [name for name in _OF_IMAGES if name in given and rows[name] is not None]
    if images:
        raise InputError(f"rows with images ({images[0]}) are not understood; use kvpref.forward_backward with Images")
    position_ids = rows["position_ids"] if "position_ids" in given else None
    if position_ids is not None and position_ids.shape != mask.shape:
        raise InputError(
            f"position_ids must have the shape of input_ids, {tuple(mask.shape)}; got {tuple(position_ids.shape)}"
        )
    check_positions(mask, position_ids)


def _flags(name: str, values: torch.Tensor) -> torch.Tensor:
    """A mask of zeros and ones as bool."""
    flags = values.bool()
    odd = (values != flags).any(dim=1)
    if bool(odd.any()):
        row = int(odd.nonzero()[0])
        raise InputError(
            f"{name} must hold zeros and ones; row {row} holds others. Apply weights to the results instead"
        )
    return flags


def _names(rows: Any) -> list[str]:
    # A TensorDict has no `in` of its own.
    return sorted(map(str, rows.keys()))


def _what(values: Any) -> str:
    if not isinstance(values, torch.Tensor):
        return f"a {type(values).__name__}"
    return "a nested one" if values.is_nested else f"shape {tuple(values.shape)}"
