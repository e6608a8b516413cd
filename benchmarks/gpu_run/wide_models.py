"""Models of real width and few layers, from their configs, and groups for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from options import SweepOptions
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from kvpref import Group, Sequence

VOCAB_SIZE = 4096
TINY_VOCAB_SIZE = 128
_WIDE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}
_TINY: dict[str, Any] = _WIDE | {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": TINY_VOCAB_SIZE,
}


def _gpt_neox(sizes: dict[str, Any]) -> PreTrainedConfig:
    return GPTNeoXConfig(**{name: value for name, value in sizes.items() if name != "num_key_value_heads"})


FAMILIES: dict[str, Callable[[dict[str, Any]], PreTrainedConfig]] = {
    "llama": lambda sizes: LlamaConfig(**sizes),
    "phi3": lambda sizes: Phi3Config(**sizes, original_max_position_embeddings=4096),
    "gpt_neox": _gpt_neox,
    "qwen3": lambda sizes: Qwen3Config(**sizes, head_dim=sizes["hidden_size"] // sizes["num_attention_heads"]),
}


def make_model(family: str, options: SweepOptions, *, rewards: bool = False) -> PreTrainedModel:
    """Random weights in the dtype of the options, eager attention, training mode; the same at every call."""
    config = FAMILIES[family](_TINY if options.dry_run else _WIDE)
    config._attn_implementation = "eager"
    if rewards:
        config.num_labels = 1
    auto_class: Any = AutoModelForSequenceClassification if rewards else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(options.device):
        model: PreTrainedModel = auto_class.from_config(config, dtype=options.dtype)
    return model.train()


def make_groups(options: SweepOptions) -> list[Group]:
    """Three levels: a system prompt over two prompts over their responses; and a prompt that shares nothing."""
    generator = random.Random(0)
    shrink = 16 if options.dry_run else 1
    vocab_size = TINY_VOCAB_SIZE if options.dry_run else VOCAB_SIZE

    def tokens(count: int) -> list[int]:
        return [generator.randrange(3, vocab_size) for _ in range(max(1, count // shrink))]

    def group(prompt: list[int], *lengths: int) -> Group:
        # Different first tokens, so that nothing is shared by chance.
        responses = [[3 + index, *tokens(length)] for index, length in enumerate(lengths)]
        return Group([Sequence.from_prompt_and_response(prompt, response) for response in responses])

    system = tokens(256)
    return [group(system + tokens(160), 96, 64, 130), group(system + tokens(48), 80, 1), group(tokens(100), 40, 70)]
