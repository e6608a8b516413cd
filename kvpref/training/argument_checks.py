"""Checks of training arguments that cannot work, or would silently change results, whatever the model and data."""

from __future__ import annotations

import math
from typing import Any

from accelerate.parallelism_config import ParallelismConfig
from transformers import TrainingArguments

from kvpref.errors import InputError

_NEVER = {
    "neftune_noise_alpha": (
        "a shared prompt is embedded once, so its responses could not get separate noise, and stored reference "
        "log-probs have none; leave it out"
    ),
    "use_liger_kernel": "it replaces layers, and kvpref runs its own fused LM head; leave it out",
}
"""Arguments of transformers that are refused if set, and why."""

_AT_LEAST_ZERO = ("learning_rate", "weight_decay", "adam_epsilon")
_BELOW_ONE = ("adam_beta1", "adam_beta2")


def check_arguments(args: TrainingArguments) -> None:
    """Raise InputError for what transformers would accept, or refuse late or unclearly. Runs before its checks."""
    for name, reason in _NEVER.items():
        if getattr(args, name):
            raise InputError(f"{name} cannot be used: {reason}")
    for name in _AT_LEAST_ZERO:
        value = getattr(args, name)
        if _is_number(value) and not 0 <= value < math.inf:
            raise InputError(f"{name} must be at least 0; got {value!r}")
    for name in _BELOW_ONE:
        value = getattr(args, name)
        if _is_number(value) and not 0 <= value < 1:
            raise InputError(f"{name} must be at least 0 and below 1; got {value!r}")
    parallelism: Any = args.parallelism_config
    if parallelism is not None and not isinstance(parallelism, ParallelismConfig):
        raise InputError(
            f"parallelism_config must be an accelerate.ParallelismConfig, which only Python can give; got "
            f"{parallelism!r}"
        )
    if args.load_best_model_at_end:
        _check_best_model(args)


def check_sequence_parallel(args: TrainingArguments, num_ranks: int) -> None:
    """Raise InputError if the processes cannot form groups of this many ranks. Called once they are counted."""
    if num_ranks == 1:
        return
    if num_ranks < 1 or args.world_size % num_ranks:
        raise InputError(
            f"sequence_parallel must divide the number of processes; got {num_ranks} with {args.world_size} process(es)"
        )
    parallelism: Any = args.parallelism_config
    for name in ("sp_size", "cp_size", "tp_size"):
        size = getattr(parallelism, name, 1)
        if size > 1:
            raise InputError(
                f"sequence_parallel splits rows over ranks, and so would accelerate's {name}={size}, which knows "
                "nothing of shared prefixes; leave that out of parallelism_config"
            )


def _check_best_model(args: TrainingArguments) -> None:
    """Raise InputError unless there is an evaluation at each checkpoint, by which the best is chosen."""
    evaluates, saves = (getattr(item, "value", item) for item in (args.eval_strategy, args.save_strategy))
    if evaluates == "no":
        raise InputError(
            "load_best_model_at_end chooses by evaluations, and there are none: give evaluation data (--eval-data, "
            "eval_dataset) and how often to evaluate (--eval-steps, or eval_strategy), or leave it out"
        )
    if saves == "best":
        return
    if saves != evaluates:
        raise InputError(
            f"load_best_model_at_end needs an evaluation at each checkpoint, and eval_strategy is {evaluates} while "
            f"save_strategy is {saves}; make them the same, or save_strategy best"
        )
    every = args.eval_steps or args.logging_steps
    if saves == "steps" and every >= 1 and args.save_steps >= 1 and args.save_steps % every:
        raise InputError(
            f"load_best_model_at_end needs an evaluation at each checkpoint: save_steps ({args.save_steps:g}) must be "
            f"a multiple of eval_steps ({every:g})"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
