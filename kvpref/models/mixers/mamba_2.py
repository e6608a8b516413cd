"""Mamba-2: `mamba2_chunk_scan`."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from kvpref.models.mixers.call import Function, MixerCall, in_wide


def state_space(original: Function, call: MixerCall) -> Function:
    """The function that replaces it in a pass, on (1, T, ...) each. Rows of zeros have step 0: no change of state."""

    def stand_in(
        inputs: torch.Tensor,
        steps: torch.Tensor,
        decay: torch.Tensor,
        to_state: torch.Tensor,
        from_state: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        # Done here, because the function would give padding steps too.
        steps = in_wide(steps)
        if options["dt_bias"] is not None:
            steps = steps + in_wide(options["dt_bias"])
        if options["dt_softplus"]:
            steps = functional.softplus(steps)
        steps = steps.clamp(*options.get("dt_limit", (0.0, None)))
        own = {name: options[name] for name in ("chunk_size", "D", "z")}

        def scan(rows: tuple[torch.Tensor, ...], initial: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            x, dt, b, c = rows
            out, final = original(x, dt, decay, b, c, initial_states=initial, return_final_states=True, **own)
            return out, final

        return call.scan(scan, *(tensor[0] for tensor in (inputs, steps, to_state, from_state))).unsqueeze(0)

    return stand_in
