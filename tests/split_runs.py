"""Runs of the trainer whose ranks share micro-batches, or that one process makes alone."""

from __future__ import annotations

from typing import Any

import torch
from fsdp2_runs import forget_process_state
from preference_runs import VOCAB_SIZE, make_args, make_groups
from transformers import GPT2Config, GPT2LMHeadModel

import kvpref
from kvpref.parallel.accelerate_fsdp2 import is_fsdp2

RUNS: dict[str, dict[str, Any]] = {
    "full": {"eval_strategy": "steps", "eval_steps": 1},
    "bounded": {"schedule": "bounded", "max_tokens_per_chunk": 30, "checkpoint": "all"},
    "copied_reference": {"precompute_reference": False},
    "sharded": {"precompute_reference": False, "eval_strategy": "steps", "eval_steps": 1},
    "sharded_bounded": {"schedule": "bounded", "max_tokens_per_chunk": 30},
}
GROUPS_PER_STEP = 6
NOT_COMPARED = (
    *("prefix_cache_bytes", "peak_memory_bytes", "peak_memory_rank", "rank_imbalance", "token_saving", "total_flos"),
    "rewards/accuracies",
)
"""What is measured, what only several ranks have, and in the first step the signs of rounding errors."""


def make_model() -> GPT2LMHeadModel:
    """As `preference_runs.make_model`, with four heads."""
    torch.manual_seed(0)
    sizes = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=0, **sizes, **no_dropout)
    return GPT2LMHeadModel(config).double()


def train(name: str, output: str, sequence_parallel: int) -> dict[str, Any]:
    """Two steps; the weights, and what was logged."""
    world_size = forget_process_state()
    settings = {"bf16": False, "sequence_parallel": sequence_parallel, **RUNS[name]}
    if name.startswith("sharded") and world_size > 1:
        settings["fsdp"] = "full_shard"
    args = make_args(f"{output}/{name}-{sequence_parallel}", **settings)
    args.per_device_train_batch_size = GROUPS_PER_STEP // args.num_data_ranks
    model = make_model()
    groups = make_groups(12)
    trainer = kvpref.PreferenceTrainer(model, args, groups, groups[:5])
    trainer.train()
    assert is_fsdp2(trainer.model) == ("fsdp" in settings)
    logs = [
        {
            key: value
            for key, value in line.items()
            if key not in NOT_COMPARED and "second" not in key and "runtime" not in key
        }
        for line in trainer.state.log_history
    ]
    return {
        "weights": {key: whole(weight.detach()).clone() for key, weight in trainer.model.named_parameters()},
        "logs": logs,
        "num_groups": trainer.token_meter.num_groups * args.num_data_ranks,
        "flos": trainer.state.total_flos,
    }


def whole(weight: torch.Tensor) -> torch.Tensor:
    """All of a weight that may be in pieces."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
