"""Converts padded rows, as TRL's collators make them, to a kvpref batch and back.

Shape legend: B rows of L columns, padded on either side; S scored tokens over all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvpref.errors import InputError
from kvpref.integrations.padded_sequences import PlaceImages, check_positions, padded_sequences, token_mask
from kvpref.plan.batch import Batch, collate
from kvpref.records.groups import Group

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True, eq=False)
class PaddedRows:
    """The rows of one call as a batch, with shared prefixes found across all of them."""

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
            attention_mask: (B, L), 1 for tokens and 0 for padding; None if all are tokens.
            labels: (B, L) int64, the token itself where it is scored and -100 elsewhere.
            position_ids: (B, L) int64, counted from each row's first token, if given.
            place_images: Finds the images of the rows; None if there are none.

        Raises:
            InputError: If the rows are not padded sequences, or labels differ from the row's own tokens or score
                image placeholders.
        """
        mask = token_mask(input_ids, attention_mask)
        check_positions(mask, position_ids)
        scored = labels != IGNORED_LABEL
        scored[:, 0] = False  # the first token has no predictor
        if bool((scored & ~mask).any()):
            raise InputError("labels score padding; they must be -100 wherever attention_mask is 0")
        if bool((scored & (labels != input_ids)).any()):
            raise InputError("labels differ from input_ids; kvpref scores each row's own tokens, labels shifted inside")
        sequences = padded_sequences(input_ids, mask, scored, place_images)
        batch = collate([Group(sequences)], device=input_ids.device)
        return cls(batch=batch, scored=scored[:, 1:], targets=input_ids[scored])

    def pad(self, values: torch.Tensor | None) -> torch.Tensor | None:
        """Spread (S,) values of scored tokens to (B, L - 1), zero elsewhere; None stays None."""
        if values is None:
            return None
        # Stays in the graph even if no token is scored, so that a backward pass has one.
        return values.new_zeros(self.scored.shape).masked_scatter(self.scored, values)


def unscored_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Batch:
    """A batch of the rows, one sequence each, without scored tokens, for reading rewards.

    Args:
        input_ids: (B, L) int64.
        attention_mask: (B, L), 1 for tokens and 0 for padding; None where all are tokens.

    Raises:
        InputError: If the rows are not padded sequences.
    """
    mask = token_mask(input_ids, attention_mask)
    sequences = padded_sequences(input_ids, mask, torch.zeros_like(mask))
    return collate([Group(sequences)], device=input_ids.device)
