"""DeepSpeed's configuration: which settings do not work with passes that bypass the engine, and which they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from kvpref.errors import UnsupportedModelError

_STAGE = "zero_optimization.stage"

_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    _STAGE: (
        lambda stage: stage not in (1, 2, 3),
        "choose stage 1, 2 or 3, or leave DeepSpeed out, which is DistributedDataParallel",
    ),
    "fp16.enabled": (bool, "its loss scale is the engine's own; use bf16"),
    "torch_autocast.enabled": (bool, "use bf16"),
    "tensor_parallel.autotp_size": (lambda size: size > 1, "leave it out"),
    "sequence_parallel_size": (lambda size: size > 1, "kvpref splits rows itself; leave it out"),
    "expert_parallel.enabled": (bool, "leave it out"),
    "zero_optimization.zero_hpz_partition_size": (lambda size: size > 1, "leave ZeRO++ out"),
    "zero_optimization.zero_quantized_weights": (bool, "leave ZeRO++ out"),
    "zero_optimization.zero_quantized_nontrainable_weights": (bool, "leave ZeRO++ out"),
    "zero_optimization.zero_quantized_gradients": (bool, "leave ZeRO++ out"),
    "zero_optimization.mics_shard_size": (lambda size: size > 0, "leave MiCS out"),
    "zero_optimization.zenflow": (bool, "leave it out"),
    "zero_optimization.offload_optimizer.device": (lambda device: device == "nvme", "use cpu, or none"),
    "zero_optimization.offload_optimizer.super_offload": (bool, "leave it out"),
    "zero_optimization.offload_param.device": (lambda device: device == "nvme", "use none"),
    "optimizer.type": (
        lambda name: str(name).lower() in ("onebitadam", "onebitlamb", "zerooneadam"),
        "it talks to other ranks itself; use AdamW",
    ),
    "compile.deepcompile": (bool, "use compile_layers"),
    "data_efficiency.enabled": (bool, "it changes data or layers from step to step; leave it out"),
    "curriculum_learning.enabled": (bool, "it changes data from step to step; leave it out"),
    "progressive_layer_drop.enabled": (bool, "it changes layers from step to step; leave it out"),
    "sparse_gradients": (bool, "leave it out"),
    "managed_gradient_accumulation": (lambda is_managed: not is_managed, "leave it out"),
}
"""Refused settings, by their place in the configuration: for which values, and what to do instead."""


def check_config(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for the first setting under which gradients are not known to be exact."""
    for name, (is_refused, remedy) in _REFUSED.items():
        value = _look_up(config, name)
        if name == _STAGE and value is None:
            value = 0
        if value is not None and value != "auto" and is_refused(value):
            raise UnsupportedModelError(f"DeepSpeed's {name}={value!r} does not go with kvpref: {remedy}")


def check_engine(engine: Any) -> None:
    """Raise UnsupportedModelError for an engine that would not give exact gradients."""
    check_config(engine.config)
    if engine.pipeline_parallelism or engine.has_moe_layers:
        raise UnsupportedModelError("DeepSpeed's pipelines and its own MoE layers do not go with kvpref")
    if not hasattr(engine, "coalesce_grad_reduction"):
        raise UnsupportedModelError("this DeepSpeed cannot reduce gradients once per step; install deepspeed>=0.19.8")
    # `coalesce_grad_reduction` checks the same, but only at the end of a step.
    if not hasattr(engine.optimizer, "_coalesce_grad_reduction"):
        raise UnsupportedModelError(
            f"DeepSpeed chose {type(engine.optimizer).__name__}, which adds gradients up in its own way (ZeRO-1 in "
            "bf16 with data_types.grad_accum_dtype fp32, say); use ZeRO-2, or leave data_types out"
        )


def prepare_deepspeed(plugin: Any) -> None:
    """Prepare for DeepSpeed, before a model is loaded.

    ZeRO-3 partitions weights while a model is created, long before its engine is, so DeepSpeed must know the ranks by
    then.

    Args:
        plugin: accelerate's plug-in, whose configuration is completed.

    Raises:
        UnsupportedModelError: For a setting that does not work with kvpref.
    """
    config = plugin.hf_ds_config.config
    check_config(config)
    if _look_up(config, _STAGE) == 3:
        # Without it, a saved model has no weights beside DeepSpeed's own files.
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if torch.distributed.is_initialized():
        import deepspeed

        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())


def _look_up(config: Mapping[str, Any], name: str) -> Any:
    found: Any = config
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
