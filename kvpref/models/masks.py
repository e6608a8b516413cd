"""Read a layer's attention pattern from the model's own mask function.

transformers hands the registered mask function each layer type's `mask_function(batch, head, query, key) -> bool`.
It is evaluated here on positions inside a sequence, never on row indices, and only on a few rows of O(T) each.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import cast

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.masking_utils import causal_mask_function

from kvpref.errors import UnsupportedModelError

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_NUM_RANDOM_ROWS = 4


def require_causal(mask_function: MaskFunction, num_positions: int) -> None:
    """Check that a layer's mask is plain causal over sequences of up to `num_positions` tokens.

    Raises:
        UnsupportedModelError: If any probed row differs; the message says whether it is a sliding window.
    """
    if mask_function is cast(MaskFunction, causal_mask_function):
        return
    with unset_fake_temporarily():  # a step planned on fake tensors probes real positions
        visible = {row: _row(mask_function, row, num_positions) for row in _probed_rows(num_positions)}
        window = _window(visible, num_positions)
    if window == num_positions:
        return
    if window is not None:
        raise UnsupportedModelError(
            f"a layer sees only the last {window} tokens (sliding window) and this batch holds a sequence of "
            f"{num_positions} tokens; keep sequences within the window (max_prompt_tokens, max_response_tokens) or "
            "use mode 'padded'"
        )
    raise UnsupportedModelError(
        "a layer's attention mask is neither causal nor a sliding window; use mode 'padded' for this model"
    )


def _probed_rows(num_positions: int) -> list[int]:
    rows = {0, num_positions // 2, num_positions - 1}
    # A seeded generator of its own: probing must not move the user's random state.
    rows.update(random.Random(num_positions).randrange(num_positions) for _ in range(_NUM_RANDOM_ROWS))
    return sorted(rows)


def _window(visible: dict[int, torch.Tensor], num_positions: int) -> int | None:
    """How many tokens the probed rows see at most; all if they are causal, None if they are not a sliding window."""
    window = int(visible[num_positions - 1].sum())
    if all(torch.equal(mask, _causal_row(row, num_positions, window)) for row, mask in visible.items()):
        return window
    return None


def _row(mask_function: MaskFunction, row: int, num_positions: int) -> torch.Tensor:
    """Which keys the query at position `row` sees, (num_positions,) bool."""
    zero = torch.zeros((), dtype=torch.int64)
    visible = mask_function(zero, zero, torch.tensor(row), torch.arange(num_positions))
    return visible.expand(num_positions)


def _causal_row(row: int, num_positions: int, window: int) -> torch.Tensor:
    keys = torch.arange(num_positions)
    return (keys <= row) & (keys > row - window)
