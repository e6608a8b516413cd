"""The model families that are known to be exact, and why others are refused.

To add one: a row in `FAMILIES`, a tiny config in tests/tiny_models.py; the exactness tests then run over it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between families: nothing yet that the model itself does not tell."""


FAMILIES: dict[str, Family] = {
    "bamba": Family(),
    "falcon_h1": Family(),
    "falcon_mamba": Family(),
    "gemma": Family(),
    "gpt2": Family(),
    "gpt_neox": Family(),
    "granite": Family(),
    "granitemoehybrid": Family(),
    "jamba": Family(),
    "kimi_linear": Family(),
    "lfm2": Family(),
    "lfm2_moe": Family(),
    "llama": Family(),
    "mamba": Family(),
    "mamba2": Family(),
    "minimax": Family(),
    "mistral": Family(),
    "nemotron_h": Family(),
    "olmo2": Family(),
    "olmo_hybrid": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3_5_moe_text": Family(),
    "qwen3_5_text": Family(),
    "qwen3_next": Family(),
    "smollm3": Family(),
    "stablelm": Family(),
    "zamba": Family(),
    "zamba2": Family(),
}

_OWN_ATTENTION = "it does not route attention through transformers' attention interface"
_RECURRENT = "its recurrent or convolution layers would leak across sequences packed in one row"
_SOFTCAP = "it soft-caps attention scores or logits"
_EXPERTS = "its mixture-of-experts router losses count each prompt once here and N times in ordinary training"

REFUSED: dict[str, tuple[str, str]] = {
    "bloom": (_OWN_ATTENTION, "gpt_neox"),
    "codegen": (_OWN_ATTENTION, "gpt_neox"),
    "falcon": (_OWN_ATTENTION, "llama"),
    "gemma2": (_SOFTCAP, "gemma"),
    "gpt_neo": (_OWN_ATTENTION, "gpt2"),
    "gptj": (_OWN_ATTENTION, "gpt_neox"),
    "mixtral": (_EXPERTS, "mistral"),
    "mpt": (_OWN_ATTENTION, "llama"),
    "qwen2_moe": (_EXPERTS, "qwen2"),
    "qwen3_moe": (_EXPERTS, "qwen3"),
    "recurrent_gemma": (_RECURRENT, "gemma"),
    "rwkv": (_RECURRENT, "gpt_neox"),
}
