"""FSDP as requested by the training arguments or `accelerate launch`: what is accepted, and what is changed."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from kvpref.errors import InputError

_ASKED = "ACCELERATE_USE_FSDP"
_TRUE = ("1", "true", "yes", "on")

SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"
"""How checkpoints are written: by each rank its part, or by the first rank everything."""


def is_fsdp_asked(args: TrainingArguments) -> bool:
    """Whether the arguments, or the launcher, ask for FSDP."""
    return getattr(args, "fsdp_plugin_args", None) is not None or _is_true(_ASKED)


def settle_fsdp(args: TrainingArguments) -> None:
    """Check the FSDP settings, and replace unsuitable defaults of transformers.

    Checkpoints are sharded unless requested otherwise; layers are recomputed by kvpref's own activation checkpoints
    instead of FSDP's, which know nothing of passes. Every rank loads the model itself: kvpref reads the weights
    before they are sharded. Called once the arguments know how many processes there are.

    Args:
        args: Changed in place, including `checkpoint`. The launcher's settings are changed in the environment.

    Raises:
        InputError: If they cannot work, or have not been shown to be exact.
    """
    if not is_fsdp_asked(args):
        return
    config: Any = args.fsdp_config if args.fsdp else {}
    if args.fsdp and config.get("xla"):
        raise InputError("fsdp_config xla is FSDP for TPUs, on which kvpref has not been tested; leave it out")
    if args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise InputError(
            "fsdp needs several processes: start the run with torchrun or accelerate launch, or leave it out"
        )
    plugin: dict[str, Any] | None = args.fsdp_plugin_args
    _refuse(plugin)
    if _is_set(plugin, "activation_checkpointing"):
        _set(plugin, "activation_checkpointing", False)
        args.checkpoint = "all"  # type: ignore[attr-defined]
    _set(plugin, "cpu_ram_efficient_loading", False)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # read when models are loaded
    if plugin is not None and "state_dict_type" not in config:
        # transformers saves a model on its own, or for the hub, only in full.
        plugin["state_dict_type"] = FULL if args.save_only_model or args.push_to_hub else SHARDED


def _refuse(plugin: dict[str, Any] | None) -> None:
    version = os.environ.get("FSDP_VERSION", "1") if plugin is None else plugin.get("fsdp_version", 1)
    if str(version) != "2":
        raise InputError(
            f"FSDP version {version} is not supported, since kvpref is proved on FSDP2 alone; set version to 2 in "
            "fsdp_config (accelerate's configuration: fsdp_version: 2)"
        )
    if _is_set(plugin, "cpu_offload", "FSDP_OFFLOAD_PARAMS"):
        raise InputError(
            "FSDP's cpu_offload is not proved to be exact; leave it out, and for less memory use more ranks, schedule "
            "bounded or an adapter"
        )
    if _is_set(plugin, "activation_checkpointing_offload"):
        raise InputError(
            "FSDP's activation_checkpointing_offload is not supported; use schedule bounded with prefix_cache cpu"
        )


def _is_set(plugin: dict[str, Any] | None, name: str, variable: str | None = None) -> bool:
    return _is_true(variable or f"FSDP_{name.upper()}") if plugin is None else bool(plugin.get(name))


def _set(plugin: dict[str, Any] | None, name: str, value: bool) -> None:
    if plugin is None:
        os.environ[f"FSDP_{name.upper()}"] = str(value).lower()
    else:
        plugin[name] = value


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in _TRUE
