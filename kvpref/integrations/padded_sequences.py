"""Converts padded rows of tokens, as collators make them, to sequences.

Shape legend: B rows of L columns, padded on either side or on both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvpref.errors import InputError
from kvpref.records.groups import Sequence
from kvpref.records.images import PlacedImage

PlaceImages = Callable[[list[list[int]]], list[tuple[PlacedImage, ...]]]
"""From the token ids of each row to the images of each row."""


def token_mask(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Where tokens stand, (B, L) bool: one run per row.

    Args:
        input_ids: (B, L) int64.
        attention_mask: (B, L), 1 for tokens and 0 for padding; None if all are tokens.

    Raises:
        InputError: If the mask has a different shape, or a row's ones are not one run.
    """
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


def check_positions(mask: torch.Tensor, position_ids: torch.Tensor | None) -> None:
    """Check that positions, (B, L) int64 if given, count each row's tokens from 0.

    Raises:
        InputError: If they do not.
    """
    if position_ids is not None and bool(((position_ids - mask.cumsum(dim=1) + 1) * mask).any()):
        raise InputError("position_ids must count each row's tokens from 0; leave them out for that")


def padded_sequences(
    input_ids: torch.Tensor, mask: torch.Tensor, scored: torch.Tensor, place_images: PlaceImages | None = None
) -> list[Sequence]:
    """One sequence per row.

    Args:
        input_ids: (B, L) int64.
        mask: (B, L) bool, from `token_mask`.
        scored: (B, L) bool, tokens whose log-probs are wanted; none where `mask` is False.
        place_images: Finds the images of the rows; None if there are none.

    Raises:
        InputError: If a row's first token is scored, or a placeholder of an image.
    """
    # One copy to the host for all three.
    ids, tokens, flags = torch.stack([input_ids, mask.long(), scored.long()]).cpu().numpy()
    starts, lengths = tokens.argmax(axis=1), tokens.sum(axis=1)
    rows, flags_of_rows = [], []
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if flags[row, start]:
            raise InputError(f"row {row} scores its first token, which no token predicts; put a token before it")
        rows.append(ids[row, start : start + length])
        flags_of_rows.append(flags[row, start : start + length].astype(bool))
    if place_images is None:
        return list(map(Sequence, rows, flags_of_rows))
    images = place_images([row.tolist() for row in rows])
    for row, (placed, scored_here) in enumerate(zip(images, flags_of_rows, strict=True)):
        if any(scored_here[first:stop].any() for image in placed for first, stop in image.runs):
            raise InputError(
                f"row {row} scores an image; kvpref takes images in prompts alone, and none of tools in responses"
            )
    return list(map(Sequence, rows, flags_of_rows, images))
