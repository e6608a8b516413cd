"""Mamba: `mamba_selective_scan`, whose kernels take no initial state."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from kvpref.models.mixers.call import Function, MixerCall, in_wide
from kvpref.ops.recurrent import selective_scan


def selective(original: Function, call: MixerCall) -> Function:
    """The function that replaces it in a pass, on (1, D, T) and (1, N, T)."""

    def stand_in(
        inputs: torch.Tensor,
        steps: torch.Tensor,
        decay: torch.Tensor,
        to_state: torch.Tensor,
        from_state: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        skip, gate, bias = options["D"], options["z"], options["delta_bias"]
        steps = in_wide(steps) if bias is None else in_wide(steps) + in_wide(bias)[:, None]
        if options["delta_softplus"]:
            steps = functional.softplus(steps)

        def scan(rows: tuple[torch.Tensor, ...], initial: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            x, dt, b, c = rows
            return selective_scan(x, dt, decay, b, c, initial)

        rows = (tensor[0].transpose(0, 1) for tensor in (inputs, steps, to_state, from_state))
        out = call.scan(scan, *rows).transpose(0, 1).unsqueeze(0)
        if skip is not None:
            out = out + inputs * skip[:, None]
        return out if gate is None else out * functional.silu(gate)

    return stand_in
