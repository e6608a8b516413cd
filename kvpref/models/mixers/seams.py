"""The functions inside a mixer's forward that carry state from token to token, and what takes their place in a pass.

A mixer's projections, gates and norms work on single tokens, so in a pass they stay the model's own, on the packed row.
Only these functions see neighbours. Their names are the same in all releases that are supported; each is the model's own
function (which is flash-linear-attention's, mamba-ssm's or causal-conv1d's where installed) on other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from kvpref.models.mixers.call import MixerCall
from kvpref.ops.recurrent import SegmentRows, segment_convolution, selective_scan

Function = Callable[..., Any]

Stand = Callable[[Function, MixerCall], Function]
"""From the model's own function and the call it is in to what runs in its place."""


def convolution(original: Function, call: MixerCall) -> Function:
    """`causal_conv1d_fn` of (1, C, T)."""

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


def delta_rule(original: Function, call: MixerCall) -> Function:
    """`torch_chunk_gated_delta_rule` and its like, of (1, T, ...) each.

    Rows of zeros leave the state as it is: nothing is written with `beta` 0, and nothing decays with `g` 0.
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
            out: tuple[torch.Tensor, torch.Tensor] = original(
                q, k, v, g=decay, beta=write, initial_state=initial, output_final_state=True, **options
            )
            return out

        rows = (tensor[0] for tensor in (query, key, value, g, beta))
        return call.advance(_over_rows(scan), *rows).unsqueeze(0), None

    return stand_in


def state_space(original: Function, call: MixerCall) -> Function:
    """`mamba2_chunk_scan` of (1, T, ...) each. Steps of 0 leave the state as it is."""

    def stand_in(
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,  # noqa: N803
        B: torch.Tensor,  # noqa: N803
        C: torch.Tensor,  # noqa: N803
        *,
        chunk_size: int,
        D: torch.Tensor | None = None,  # noqa: N803
        z: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        **_: Any,
    ) -> torch.Tensor:
        assert z is None
        # Here and not in the function, where padding would get steps too.
        steps = _wide(dt) if dt_bias is None else _wide(dt) + _wide(dt_bias)
        steps = (functional.softplus(steps) if dt_softplus else steps).clamp(*dt_limit)

        def scan(rows: tuple[torch.Tensor, ...], initial: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            x, own_steps, b, c = rows
            out: tuple[torch.Tensor, torch.Tensor] = original(
                x, own_steps, A, b, c, chunk_size=chunk_size, D=D, initial_states=initial, return_final_states=True
            )
            return out

        rows = (tensor[0] for tensor in (hidden_states, steps, B, C))
        return call.advance(_over_rows(scan), *rows).unsqueeze(0)

    return stand_in


def selective(original: Function, call: MixerCall) -> Function:
    """`mamba_selective_scan` of (1, D, T) and (1, N, T); kernels for it know no state to begin with."""

    def stand_in(
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,  # noqa: N803
        B: torch.Tensor,  # noqa: N803
        C: torch.Tensor,  # noqa: N803
        D: torch.Tensor | None = None,  # noqa: N803
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        **_: Any,
    ) -> torch.Tensor:
        steps = _wide(dt) if delta_bias is None else _wide(dt) + _wide(delta_bias)[..., None]
        steps = functional.softplus(steps) if delta_softplus else steps

        def scan(rows: tuple[torch.Tensor, ...], initial: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            x, own_steps, b, c = rows
            return selective_scan(x, own_steps, A, b, c, initial)

        rows = (tensor[0].transpose(0, 1) for tensor in (hidden_states, steps, B, C))
        out = call.advance(_over_rows(scan), *rows).transpose(0, 1).unsqueeze(0)
        if D is not None:
            out = out + hidden_states * D[None, :, None]
        return out if z is None else out * functional.silu(z)

    return stand_in


def absent(original: Function, call: MixerCall) -> Function:
    """A kernel for the whole mixer, which says by None that it is not there."""
    return lambda *_, **__: None


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _over_rows(scan: Any) -> Any:
    def step(
        segments: SegmentRows, rows: tuple[torch.Tensor, ...], states: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return segments.scan(scan, rows, states)

    return step


SEAMS: Mapping[str, Stand] = {
    "causal_conv1d_fn": convolution,
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": state_space,
    "mamba_selective_scan": selective,
    "mamba2_split_conv1d_scan_combined": absent,
    "mamba_inner_fn": absent,
}
"""By the name that the mixer's forward calls."""
