"""The model families that are known to be exact, and why others are refused.

To add one: a row in `FAMILIES`, a tiny config in tests/tiny_models.py; the exactness tests then run over it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between families: nothing yet that the model itself does not tell."""


FAMILIES: dict[str, Family] = {
    "gemma": Family(),
    "gpt2": Family(),
    "gpt_neox": Family(),
    "granite": Family(),
    "llama": Family(),
    "mistral": Family(),
    "olmo2": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "smollm3": Family(),
    "stablelm": Family(),
}

_OWN_ATTENTION = "it does not route attention through transformers' attention interface"
_RECURRENT = "its recurrent or convolution layers would leak across sequences packed in one row"
_SOFTCAP = "it soft-caps attention scores or logits"
_EXPERTS = "its mixture-of-experts router losses count each prompt once here and N times in ordinary training"

REFUSED: dict[str, tuple[str, str]] = {
    "bloom": (_OWN_ATTENTION, "gpt_neox"),
    "codegen": (_OWN_ATTENTION, "gpt_neox"),
    "falcon": (_OWN_ATTENTION, "llama"),
    "falcon_h1": (_RECURRENT, "llama"),
    "falcon_mamba": (_RECURRENT, "llama"),
    "gemma2": (_SOFTCAP, "gemma"),
    "gpt_neo": (_OWN_ATTENTION, "gpt2"),
    "gptj": (_OWN_ATTENTION, "gpt_neox"),
    "jamba": (_RECURRENT, "mistral"),
    "lfm2": (_RECURRENT, "qwen3"),
    "mamba": (_RECURRENT, "gpt_neox"),
    "mamba2": (_RECURRENT, "gpt_neox"),
    "mixtral": (_EXPERTS, "mistral"),
    "mpt": (_OWN_ATTENTION, "llama"),
    "qwen2_moe": (_EXPERTS, "qwen2"),
    "qwen3_moe": (_EXPERTS, "qwen3"),
    "qwen3_next": (_RECURRENT, "qwen3"),
    "recurrent_gemma": (_RECURRENT, "gemma"),
    "rwkv": (_RECURRENT, "gpt_neox"),
}
