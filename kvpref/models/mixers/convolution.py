"""Short convolutions: `causal_conv1d_fn`."""

from __future__ import annotations

from typing import Any

import torch

from kvpref.models.mixers.call import Function, MixerCall
from kvpref.ops.recurrent import SegmentRows, segment_convolution


def convolution(original: Function, call: MixerCall) -> Function:
    """The function that replaces it in a pass, on (1, C, T)."""

    def stand_in(
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **_: Any,
    ) -> torch.Tensor:
        def convolve(wide: torch.Tensor) -> torch.Tensor:
            convolved: torch.Tensor = original(wide, weight, bias, activation=activation)
            return convolved

        def step(
            segments: SegmentRows, rows: tuple[torch.Tensor, ...], windows: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            out, left = segment_convolution(segments, rows[0].transpose(0, 1), windows, weight.shape[-1], convolve)
            return out.transpose(0, 1), left

        return call.advance(step, hidden_states[0].transpose(0, 1)).transpose(0, 1).unsqueeze(0)

    return stand_in
