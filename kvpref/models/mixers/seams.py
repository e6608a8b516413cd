"""The functions inside a mixer's forward that carry state from token to token, and their replacements in a pass.

A mixer's projections, gates and norms work on single tokens, so in a pass they stay the model's own, on the packed row.
Only these functions see neighbours. They have the same names in all supported releases. A replacement runs the model's
own function (flash-linear-attention's, mamba-ssm's or causal-conv1d's if installed) on rows of one segment each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvpref.models.mixers.call import Function, MixerCall
from kvpref.models.mixers.convolution import convolution
from kvpref.models.mixers.delta_rule import delta_rule
from kvpref.models.mixers.mamba import selective
from kvpref.models.mixers.mamba_2 import state_space


def _absent(original: Function, call: MixerCall) -> Function:
    """None in place of a kernel for the whole mixer, which makes the forward take another path."""
    return lambda *_, **__: None


SEAMS: Mapping[str, Callable[[Function, MixerCall], Function]] = {
    "causal_conv1d_fn": convolution,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": state_space,
    "mamba2_split_conv1d_scan_combined": _absent,
    "mamba_inner_fn": _absent,
    "mamba_selective_scan": selective,
    "torch_chunk_gated_delta_rule": delta_rule,
}
"""Replacements by the name that the mixer's forward calls, made from the model's own function and the current call."""
