"""Padded rows, as TRL's collators make them, to a kvpref batch and back.

Shape legend: B rows of L columns, padded on either side; S scored tokens over all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvpref.errors import InputError
from kvpref.plan.batch import Batch, collate
from kvpref.records.groups import Group, Sequence
from kvpref.records.images import PlacedImage

IGNORED_LABEL = -100

PlaceImages = Callable[[list[list[int]]], list[tuple[PlacedImage, ...]]]
"""From the token ids of each row, the images of each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PaddedRows:
    """The rows of one call, as a batch in which shared prefixes are found across all of them."""

    batch: Batch
    """One sequence per row."""

    scored: torch.Tensor
    """(B, L - 1) bool: whether the token in the next column is scored."""

    targets: torch.Tensor
    """(S,) int64, the scored tokens, row after row."""

    @classmethod
    def from_labels(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        place_images: PlaceImages | None = None,
    ) -> PaddedRows:
        """Read a causal language model's inputs.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L), 1 for tokens and 0 for padding; None where all are tokens.
            labels: (B, L) int64, the token itself where it is scored and -100 elsewhere.
            position_ids: (B, L) int64, counted from each row's first token, if given.
            place_images: Finds the images of the rows; None where there are none.

        Raises:
            InputError: If the rows are not padded sequences, or are scored on other tokens than their own, or on
                placeholders of images.
        """
        mask = _token_mask(input_ids, attention_mask)
        _check_positions(mask, position_ids)
        scored = labels != IGNORED_LABEL
        scored[:, 0] = False  # no column predicts it
        if bool((scored & ~mask).any()):
            raise InputError("labels score padding; they must be -100 wherever attention_mask is 0")
        if bool((scored & (labels != input_ids)).any()):
            raise InputError("labels differ from input_ids; kvpref scores each row's own tokens, labels shifted inside")
        batch = _collate(input_ids, mask, scored, place_images)
        return cls(batch=batch, scored=scored[:, 1:], targets=input_ids[scored])

    def pad(self, values: torch.Tensor | None) -> torch.Tensor | None:
        """(S,) values of scored tokens to (B, L - 1), zero where nothing is scored; None stays None."""
        if values is None:
            return None
        # Stays in the graph where no token is scored, so that a backward pass finds one.
        return values.new_zeros(self.scored.shape).masked_scatter(self.scored, values)


def unscored_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Batch:
    """A batch of the rows, one sequence each, of which no token is scored: what rewards are read from.

    Args:
        input_ids: (B, L) int64.
        attention_mask: (B, L), 1 for tokens and 0 for padding; None where all are tokens.

    Raises:
        InputError: If the rows are not padded sequences.
    """
    mask = _token_mask(input_ids, attention_mask)
    return _collate(input_ids, mask, torch.zeros_like(mask))


def _token_mask(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, L) bool, one run of tokens per row."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}; "
            f"got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask.bool()
    begins = mask & ~mask.roll(1, dims=1)
    begins[:, 0] = mask[:, 0]
    runs = begins.sum(dim=1)
    if bool((runs != 1).any()):
        row = int((runs != 1).nonzero()[0])
        raise InputError(
            f"attention_mask must hold one run of ones per row, padded left or right; row {row} has {int(runs[row])}"
        )
    return mask


def _check_positions(mask: torch.Tensor, position_ids: torch.Tensor | None) -> None:
    if position_ids is not None and bool(((position_ids - mask.cumsum(dim=1) + 1) * mask).any()):
        raise InputError("position_ids must count each row's tokens from 0; leave them out to get that")


def _collate(
    input_ids: torch.Tensor, mask: torch.Tensor, scored: torch.Tensor, place_images: PlaceImages | None = None
) -> Batch:
    # One copy to the host for all three.
    ids, tokens, flags = torch.stack([input_ids, mask.long(), scored.long()]).tolist()
    rows: list[list[int]] = []
    flags_of_rows: list[list[bool]] = []
    for row, (row_ids, row_mask, row_flags) in enumerate(zip(ids, tokens, flags, strict=True)):
        start = row_mask.index(1)
        stop = start + sum(row_mask)
        if row_flags[start]:
            raise InputError(f"row {row} scores its first token, which no token predicts; put a token before it")
        rows.append(row_ids[start:stop])
        flags_of_rows.append(list(map(bool, row_flags[start:stop])))
    images: list[tuple[PlacedImage, ...]] = [()] * len(rows) if place_images is None else place_images(rows)
    _check_prompts(images, flags_of_rows)
    sequences = map(Sequence, rows, flags_of_rows, images)
    return collate([Group(list(sequences))], device=input_ids.device)


def _check_prompts(images: list[tuple[PlacedImage, ...]], flags: list[list[bool]]) -> None:
    for row, (placed, scored) in enumerate(zip(images, flags, strict=True)):
        if any(any(scored[first:stop]) for image in placed for first, stop in image.runs):
            raise InputError(
                f"row {row} scores an image; kvpref takes images in prompts alone, and none of tools in responses"
            )
