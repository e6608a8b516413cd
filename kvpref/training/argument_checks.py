"""Training arguments that could not work, or would change results in silence, whatever the model and the data are."""

from __future__ import annotations

import math
from typing import Any

from accelerate.parallelism_config import ParallelismConfig
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from kvpref.errors import InputError

_NEVER = {
    "neftune_noise_alpha": (
        "a shared prompt is embedded once, so its responses could not get noise of their own, and stored reference "
        "log-probs have none; leave it out"
    ),
    "use_liger_kernel": "it replaces layers, and kvpref runs its own fused LM head; leave it out",
}
"""Arguments of transformers that are refused where they are set, and why."""

_AT_LEAST_ZERO = ("learning_rate", "weight_decay", "adam_epsilon")
_BELOW_ONE = ("adam_beta1", "adam_beta2")


def check_arguments(args: TrainingArguments) -> None:
    """Raise InputError for what transformers would take, or refuse late or unclearly. Called before its own checks."""
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


def check_sharding(args: TrainingArguments) -> None:
    """Raise InputError for FSDP in a process that is alone. Called once the arguments know how many there are."""
    config: Any = args.fsdp_config  # a mapping by now
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED and not (config or {}).get("xla"):
        raise InputError(
            "fsdp needs several processes: start the run with torchrun or accelerate launch, or leave it out"
        )


def _check_best_model(args: TrainingArguments) -> None:
    """The best checkpoint is known only if there is an evaluation at each."""
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
