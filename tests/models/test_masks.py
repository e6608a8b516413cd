"""Reading rules from mask functions: each rule by name, and nothing else may pass for one."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_compatibility_function,
    sliding_window_causal_mask_function,
)

from kvpref import UnsupportedModelError
from kvpref.models.masks import MAX_DENSE_POSITIONS, MaskFunction, read_rule
from kvpref.prefix.rules import CAUSAL, Rule

LENGTHS = (1, 2, 3, 5, 17, 64, 200)
NO_PADDING = torch.zeros(1, dtype=torch.int64)


def wrapped_causal(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Causal, but not the function that is known by identity."""
    return causal_mask_function(batch, head, query, key) & True


def without_first_key(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return causal_mask_function(batch, head, query, key) & ((key > 0) | (query == 0))


@pytest.mark.parametrize("num_positions", LENGTHS)
def test_causal_masks(num_positions: int) -> None:
    for mask in (causal_mask_function, wrapped_causal, and_masks(causal_mask_function, wrapped_causal)):
        assert read_rule(mask, num_positions) == CAUSAL


@pytest.mark.parametrize("num_positions", LENGTHS)
def test_what_the_sequences_cannot_tell_from_causal_is_causal(num_positions: int) -> None:
    for size in (num_positions, num_positions + 1, 4096):
        assert read_rule(sliding_window_causal_mask_function(size), num_positions) == CAUSAL
        assert read_rule(chunked_causal_mask_function(size, NO_PADDING), num_positions) == CAUSAL


@pytest.mark.parametrize("num_positions", LENGTHS[1:])
def test_windows_and_chunks(num_positions: int) -> None:
    """With one token more than the size only the last row shows the difference, so it must be among those probed."""
    for size in {num_positions - 1, max(1, num_positions // 2), max(1, num_positions // 3)}:
        assert read_rule(sliding_window_causal_mask_function(size), num_positions) == Rule("window", size)
        if size > 1:  # a chunk of one token is a window of one
            assert read_rule(chunked_causal_mask_function(size, NO_PADDING), num_positions) == Rule("chunk", size)


def test_packing_around_a_mask_is_passed_over() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    for mask, rule in ((sliding_window_causal_mask_function(3), Rule("window", 3)), (causal_mask_function, CAUSAL)):
        packed = packed_sequence_compatibility_function(mask, positions, torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
        assert read_rule(packed, 30) == rule


@pytest.mark.parametrize("num_positions", [5, 17, 64, 200])
def test_other_masks_are_dense_and_told_row_by_row(num_positions: int) -> None:
    rule = read_rule(without_first_key, num_positions)
    assert rule.kind == "dense"
    assert rule.ranges == (((0, 1),), *(((1, query + 1),) for query in range(1, num_positions)))

    def window_and_first(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return (key <= query) & ((query - key < 2) | (key == 0))

    assert read_rule(window_and_first, num_positions).ranges[4] == ((0, 1), (3, 5))


def test_masks_that_no_blocks_can_say_are_refused() -> None:
    def sees_nothing(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key < query) & (query > 0)

    def scalar_only(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.tensor(int(key) <= int(query))

    images = or_masks(causal_mask_function, blockwise_overlay(torch.tensor([[-1, 0, 0, -1, -1]])))
    unseen = torch.ones(1, 40, dtype=torch.bool)
    unseen[0, 7] = False

    def padded(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return causal_mask_function(batch, head, query, key) & (unseen[batch, key] | (query < 20))

    refused: list[tuple[MaskFunction, int, str]] = [
        (bidirectional_mask_function, 40, "see later ones"),
        (sees_nothing, 40, "see nothing"),
        (padded, 40, "more than positions"),
        (scalar_only, 40, "cannot be evaluated"),
        (images, 5, "more than positions"),
        (without_first_key, MAX_DENSE_POSITIONS + 1, str(MAX_DENSE_POSITIONS + 1)),
    ]
    for mask, num_positions, message in refused:
        with pytest.raises(UnsupportedModelError, match=rf"(?s){message}.*padded"):
            read_rule(mask, num_positions)


def test_chunks_of_a_step_planned_on_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        assert read_rule(chunked_causal_mask_function(4, mode.from_tensor(NO_PADDING)), 9) == Rule("chunk", 4)


def test_probing_does_not_move_the_random_state() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    read_rule(wrapped_causal, 50)
    assert torch.equal(torch.rand(1), expected)
