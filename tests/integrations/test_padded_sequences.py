"""Padded rows as sequences."""

from __future__ import annotations

import pytest
import torch

from kvpref import InputError
from kvpref.integrations.padded_sequences import check_positions, padded_sequences, token_mask

IDS = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 0, 0, 0], [0, 4, 3, 2, 0]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]])


def test_padding_goes_on_either_side() -> None:
    mask = token_mask(IDS, MASK)
    scored = torch.zeros_like(mask)
    scored[0, 3], scored[2, 2:4] = True, True
    first, second, third = padded_sequences(IDS, mask, scored)
    assert (first.input_ids, first.scored) == ((5, 6, 7), (False, True, False))
    assert (second.input_ids, second.scored) == ((8, 9), (False, False))
    assert (third.input_ids, third.scored) == ((4, 3, 2), (False, True, True))


def test_without_a_mask_all_are_tokens() -> None:
    assert token_mask(IDS, None).all()


def test_a_row_is_one_run_of_tokens() -> None:
    for row, values in ((1, [1, 0, 1, 0, 0]), (2, [0] * 5), (0, [1, 0, 0, 0, 1])):
        mask = MASK.clone()
        mask[row] = torch.tensor(values)
        with pytest.raises(InputError, match=f"one run of ones per row.*row {row} has {sum(values)}"):
            token_mask(IDS, mask)


def test_positions_count_tokens() -> None:
    mask = token_mask(IDS, MASK)
    check_positions(mask, None)
    check_positions(mask, torch.tensor([[9, 9, 0, 1, 2], [0, 1, 1, 1, 1], [0, 0, 1, 2, 2]]))
    with pytest.raises(InputError, match="position_ids must count each row's tokens from 0"):
        check_positions(mask, torch.arange(5).expand(3, 5))


def test_what_cannot_be_scored_is_refused() -> None:
    scored = torch.zeros(IDS.shape, dtype=torch.bool)
    scored[1, 0] = True
    with pytest.raises(InputError, match="row 1 scores its first token"):
        padded_sequences(IDS, token_mask(IDS, MASK), scored)
