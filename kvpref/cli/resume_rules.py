"""What may differ when a run is resumed. Anything not listed here changes results and is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvpref.cli.given_settings import LOSS_ARG
from kvpref.losses import make_loss

LOGGING = frozenset(
    {
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "include_num_input_tokens_seen",
        "report_to",
        "run_name",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "disable_tqdm",
        "debug",
        "skip_memory_metrics",
    }
)
SAVING = frozenset(
    {
        "output",
        "save_total_limit",
        "save_on_each_node",
        "enable_jit_checkpoint",
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
        "reference_logps_dir",
    }
)
CADENCE = frozenset(
    {"save_steps", "save_strategy", "eval_steps", "eval_strategy", "eval_delay", "eval_on_start", "do_eval"}
)
"""When to evaluate and save, which decides the result if the best model is loaded at the end."""

BUDGET = frozenset(
    {
        "schedule",
        "max_tokens_per_chunk",
        "auto_budget",
        "prefix_cache",
        "gather_weights",
        "reduce_grads",
        "checkpoint",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "backend",
        "share_across_micro_batches",
        "compile_layers",
        "torch_compile",
        "torch_empty_cache_steps",
        "per_device_eval_batch_size",
        "reference_device",
    }
)
"""Settings of memory and speed; results are the same up to rounding."""

CUT = frozenset({"max_tokens_per_micro_batch", "mode"})
"""How a step is cut into micro-batches; results are the same up to rounding, except for losses that couple groups."""

MACHINE = frozenset(
    {
        "use_cpu",
        "local_rank",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "ddp_backend",
        "ddp_timeout",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_find_unused_parameters",
        "ddp_static_graph",
    }
)

FREE_SCHEDULES = frozenset({"constant", "constant_with_warmup"})
"""Learning-rate schedules that do not depend on the number of steps, so that a run may be made longer."""

LENGTH = ("max_steps", "num_train_epochs")


def may_differ(values: Mapping[str, Any]) -> frozenset[str]:
    """The settings that do not change the results of a run.

    Args:
        values: The run's settings, in the form `RunConfig.of` takes.
    """
    taken = LOGGING | SAVING | BUDGET | MACHINE
    if not values.get("load_best_model_at_end"):
        taken |= CADENCE
    if not is_coupled(values):
        taken |= CUT
    return taken


def is_coupled(values: Mapping[str, Any]) -> bool:
    """Whether the loss couples the groups of a micro-batch."""
    settings = {name.removeprefix(LOSS_ARG): value for name, value in values.items() if name.startswith(LOSS_ARG)}
    return make_loss(values.get("loss", "dpo"), **settings).couples_groups


def may_be_longer(values: Mapping[str, Any]) -> bool:
    """Whether extending the run gives the same results as a longer run from the start."""
    schedule, warmup = values.get("lr_scheduler_type"), values.get("warmup_steps") or 0
    # A warmup given as a share of all steps depends on their number.
    return schedule in FREE_SCHEDULES and (schedule == "constant" or warmup == 0 or warmup >= 1)
