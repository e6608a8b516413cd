"""Forward and backward of models whose layers are not all causal attention and dense MLPs, against `packed`.

Each row has its own ideal: windows see few of the repeated prompt's tokens, recurrent layers cost by the token, and
experts are as many as a token is sent to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from forward_backward import mean_nll
from mode_rows import compare_model
from options import MissingDataError, SweepOptions
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from workloads import Shape, make_groups, one_micro_batch

import kvpref
from kvpref.errors import UnsupportedModelError
from kvpref.profiling.compare.comparison import Comparison

TITLE = "forward + backward of models with windows, recurrences and experts"
BAR = 0.85
_VOCABULARY = 1024

_SIZES: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 16384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WIDE: dict[str, Any] = {**_SIZES, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
_DELTA: dict[str, Any] = {
    "head_dim": 64,
    "num_experts": 0,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
_MAMBA2: dict[str, Any] = {
    "attn_layer_indices": [3],
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 64,
}

MODELS: dict[str, tuple[str, dict[str, Any], Shape]] = {
    "windows of 512 in 5 of 6 layers": (
        "qwen2",
        {
            **_SIZES,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 6,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 512,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
        Shape(prompt=8192, response=128, responses=8),
    ),
    "gated delta in 3 of 4 layers": ("qwen3_next", {**_WIDE, **_DELTA}, Shape(prompt=1024, response=128, responses=8)),
    "Mamba2 in 3 of 4 layers": ("bamba", {**_WIDE, **_MAMBA2}, Shape(prompt=1024, response=128, responses=8)),
    "8 experts, 2 active": (
        "qwen3_moe",
        {**_WIDE, "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
        Shape(prompt=1024, response=128, responses=8),
    ),
}
"""Row -> model type, settings and groups."""


def rows(options: SweepOptions) -> dict[str, Callable[[], Comparison]]:
    """Name -> what measures that row."""
    if options.gpu_rows:
        return {}
    return {name: partial(_measure, name, *row, options) for name, row in MODELS.items()}


def _measure(name: str, kind: str, settings: Mapping[str, Any], shape: Shape, options: SweepOptions) -> Comparison:
    if options.dry_run:
        shape = replace(shape, prompt=24, response=2, responses=2)
    elif options.quick:
        shape = replace(shape, prompt=shape.prompt // 2)
    try:
        model = _build(kind, settings, options)
    except UnsupportedModelError as error:
        raise MissingDataError(str(error)) from None
    cuts = one_micro_batch(make_groups(shape, _VOCABULARY), modes=("two_pass", "packed"))
    facts = {"model_type": kind, **settings, "prompt": shape.prompt, "responses": shape.responses}
    return compare_model(name, model, cuts, options, loss=mean_nll, facts=facts, bar=None if options.dry_run else BAR)


def _build(kind: str, settings: Mapping[str, Any], options: SweepOptions) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=options.dtype)
    return kvpref.attach(model).train()
