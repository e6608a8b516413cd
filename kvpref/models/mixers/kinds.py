"""Which layers are mixers that kvpref knows.

To add one: its class and kind here, if only functions of that kind mix tokens in its forward; and a tiny config in
tests/models/mixers/tiny_hybrids.py, which the exactness tests then cover.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class MixerKind:
    """A way to carry state from token to token."""

    name: str
    """A phrase for `kvpref check`."""

    seams: tuple[str, ...] = ()
    """The functions that the layer's forward must call for it; empty if kvpref replaces the whole forward."""

    optional: tuple[str, ...] = ()
    """Further functions that it may call."""


SHORT_CONVOLUTION = MixerKind(name="short convolution", seams=("causal_conv1d_fn",))
GATED_DELTA = MixerKind(name="gated delta rule", seams=("causal_conv1d_fn", "torch_chunk_gated_delta_rule"))
KIMI_DELTA = MixerKind(name="Kimi delta attention", seams=("causal_conv1d_fn", "chunk_kimi_delta_attention"))
MAMBA_2 = MixerKind(
    name="Mamba-2",
    seams=("causal_conv1d_fn", "mamba2_chunk_scan"),
    optional=("mamba2_split_conv1d_scan_combined",),
)
MAMBA = MixerKind(name="Mamba", seams=("causal_conv1d_fn", "mamba_selective_scan"), optional=("mamba_inner_fn",))
LIGHTNING = MixerKind(name="lightning attention")

KINDS: Mapping[str, MixerKind] = {
    "BailingHybridDeltaAttention": KIMI_DELTA,
    "BambaMixer": MAMBA_2,
    "FalconH1Mixer": MAMBA_2,
    "FalconMambaMixer": MAMBA,
    "Glm5NextTextLinearAttention": KIMI_DELTA,
    "GraniteMoeHybridMambaLayer": MAMBA_2,
    "JambaMambaMixer": MAMBA,
    "KimiLinearDeltaAttention": KIMI_DELTA,
    "Lfm2MoeShortConv": SHORT_CONVOLUTION,
    "Lfm2ShortConv": SHORT_CONVOLUTION,
    "Lfm3ShortConv": SHORT_CONVOLUTION,
    "Mamba2Mixer": MAMBA_2,
    "MambaMixer": MAMBA,
    "MiniMaxLightningAttention": LIGHTNING,
    "NemotronHMamba2Mixer": MAMBA_2,
    "OlmoHybridGatedDeltaNet": GATED_DELTA,
    "Qwen3NextGatedDeltaNet": GATED_DELTA,
    "Qwen3_5GatedDeltaNet": GATED_DELTA,
    "Qwen3_5MoeGatedDeltaNet": GATED_DELTA,
    "Zamba2MambaMixer": MAMBA_2,
    "ZambaMambaMixer": MAMBA,
}
"""Kinds by the name of the layer's class in transformers."""


def has_mixers(model: nn.Module) -> bool:
    """Whether a model has layers that carry a state from token to token."""
    return any(kind.__name__ in KINDS for module in model.modules() for kind in type(module).__mro__)
