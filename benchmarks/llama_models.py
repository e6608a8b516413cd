"""The models of the sweeps: Llamas with random weights, since times do not depend on the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from options import SweepOptions
from places import HERE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import kvpref


@dataclass(frozen=True, kw_only=True)
class LlamaSizes:
    """The sizes that decide what a step costs."""

    hidden_size: int
    """Elements of a hidden state."""

    intermediate_size: int
    """Elements inside the MLP."""

    num_layers: int
    """Blocks."""

    num_heads: int
    """Query heads."""

    num_kv_heads: int
    """Key and value heads."""

    vocab_size: int
    """Rows of the LM head, which is tied to the embedding."""

    @property
    def head_dim(self) -> int:
        """Elements per head."""
        return self.hidden_size // self.num_heads

    def with_vocabulary(self, vocab_size: int) -> LlamaSizes:
        """The same body under another vocabulary."""
        return replace(self, vocab_size=vocab_size)

    @classmethod
    def from_json(cls, name: str) -> LlamaSizes:
        """Read a configuration beside this file."""
        values: dict[str, Any] = json.loads((HERE / name).read_text())
        return cls(
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            num_kv_heads=values["num_key_value_heads"],
            vocab_size=values["vocab_size"],
        )


SMALL = LlamaSizes.from_json("llama_384.json")
"""8 x 384 with the GPT-NeoX vocabulary of 50k."""

SMOLLM_LIKE = LlamaSizes(
    hidden_size=576, intermediate_size=1536, num_layers=6, num_heads=9, num_kv_heads=3, vocab_size=49152
)
"""6 layers as wide as those of SmolLM-135M, and its vocabulary."""

MEDIUM = LlamaSizes(hidden_size=256, intermediate_size=768, num_layers=6, num_heads=4, num_kv_heads=2, vocab_size=8192)
"""For steps of 40k tokens that a CPU runs in a minute."""

LONG_CONTEXT = LlamaSizes(
    hidden_size=64, intermediate_size=192, num_layers=2, num_heads=2, num_kv_heads=1, vocab_size=1024
)
"""Small enough for a CPU to repeat a prompt of 7000 tokens thirty times in one step."""

LAYERS_OF_8B = LlamaSizes(
    hidden_size=4096, intermediate_size=14336, num_layers=4, num_heads=32, num_kv_heads=8, vocab_size=16384
)
"""Four layers of an 8B Llama. With an eighth of its layers, an eighth of its vocabulary of 128k: the head keeps its
share of the FLOPs."""

DRY_RUN = LlamaSizes(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=1024)
"""For runs that measure nothing."""


def build_model(sizes: LlamaSizes, options: SweepOptions) -> PreTrainedModel:
    """An attached model with random weights, in training mode, on the device of the sweeps."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=options.dtype)
    return kvpref.attach(model).train()
