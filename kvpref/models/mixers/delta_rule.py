"""The gated delta rule and its variant per channel: `torch_chunk_gated_delta_rule`, `chunk_kimi_delta_attention`."""

from __future__ import annotations

from typing import Any

import torch

from kvpref.models.mixers.call import Function, MixerCall


def delta_rule(original: Function, call: MixerCall) -> Function:
    """The function that replaces it in a pass, on (1, T, ...) each.

    Rows of zeros do not change the state: `beta` 0 writes nothing, and `g` 0 means no decay.
    """

    def stand_in(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        g: torch.Tensor,
        beta: torch.Tensor,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        for name in ("initial_state", "output_final_state", "cu_seqlens"):
            options.pop(name, None)

        def scan(rows: tuple[torch.Tensor, ...], initial: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            q, k, v, decay, write = rows
            out, final = original(
                q, k, v, g=decay, beta=write, initial_state=initial, output_final_state=True, **options
            )
            return out, final

        return call.scan(scan, *(tensor[0] for tensor in (query, key, value, g, beta))).unsqueeze(0), None

    return stand_in
