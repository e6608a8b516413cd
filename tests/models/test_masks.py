"""Reading attention patterns from mask functions: nothing but plain causal attention may pass."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    sliding_window_causal_mask_function,
)

from kvpref import UnsupportedModelError
from kvpref.models.masks import MaskFunction, require_causal

LENGTHS = (1, 2, 3, 5, 17, 64, 200)


def wrapped_causal(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Causal, but not the function that is known by identity."""
    return causal_mask_function(batch, head, query, key) & True


@pytest.mark.parametrize("num_positions", LENGTHS)
def test_causal_masks_pass(num_positions: int) -> None:
    for mask in (causal_mask_function, wrapped_causal, and_masks(causal_mask_function, wrapped_causal)):
        require_causal(mask, num_positions)


@pytest.mark.parametrize("num_positions", LENGTHS)
def test_windows_that_hold_the_longest_sequence_pass(num_positions: int) -> None:
    for window in (num_positions, num_positions + 1, 4096):
        require_causal(sliding_window_causal_mask_function(window), num_positions)


@pytest.mark.parametrize("num_positions", LENGTHS[1:])
def test_windows_one_token_too_short_are_refused(num_positions: int) -> None:
    """Only the last row shows the difference, so it must be among those probed."""
    for window in {num_positions - 1, max(1, num_positions // 2), 1}:
        with pytest.raises(UnsupportedModelError, match=rf"last {window} tokens .* {num_positions} tokens"):
            require_causal(sliding_window_causal_mask_function(window), num_positions)


@pytest.mark.parametrize("num_positions", [5, 17, 64, 200])
def test_other_patterns_are_refused(num_positions: int) -> None:
    chunked = and_masks(chunked_overlay(4, torch.zeros(1, dtype=torch.int64)), causal_mask_function)

    def without_first_key(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return causal_mask_function(batch, head, query, key) & (key > 0)

    masks: list[MaskFunction] = [chunked, bidirectional_mask_function, without_first_key]
    for mask in masks:
        with pytest.raises(UnsupportedModelError, match="padded"):
            require_causal(mask, num_positions)


def test_probing_does_not_move_the_random_state() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    require_causal(wrapped_causal, 50)
    assert torch.equal(torch.rand(1), expected)
