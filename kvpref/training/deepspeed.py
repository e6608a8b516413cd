"""What the trainer has to know about DeepSpeed, whose engine transformers creates when training begins."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments

from kvpref.errors import InputError
from kvpref.models.partitioned import is_partitioned
from kvpref.parallel.deepspeed import is_engine


def check_weights(model: nn.Module, args: TrainingArguments) -> None:
    """Raise InputError for weights that DeepSpeed would silently round."""
    if args.deepspeed_plugin is not None and any(weight.dtype == torch.float64 for weight in model.parameters()):
        raise InputError(
            "DeepSpeed keeps the weights that it trains in float32 at most, and the model has some in float64; load it "
            "in another dtype (--dtype float32), or leave DeepSpeed out"
        )


@torch.no_grad()
def cast_weights(model: nn.Module, accelerator: Accelerator) -> None:
    """Cast a model to the dtype in which DeepSpeed will run it, as its engine would do later.

    The reference is the model before training; in another precision it would not match the policy.

    Args:
        model: The model, before the engine is made.
        accelerator: The trainer's; without DeepSpeed nothing is done.
    """
    plugin: Any = accelerator.state.deepspeed_plugin
    if plugin is None:
        return
    dtype = plugin.hf_ds_config.dtype()
    if dtype == torch.float32:
        return  # the engine then leaves the weights alone
    from deepspeed.runtime.keep_in_fp32 import keep_in_fp32_pattern

    kept = keep_in_fp32_pattern(model, plugin.hf_ds_config.config.get("keep_in_fp32_modules"), dtype)
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not is_partitioned(weight) and not (kept and kept.search(name)):
            weight.data = weight.data.to(dtype)


def change_weights(model: nn.Module) -> None:
    """Let DeepSpeed's engine run its optimizer; transformers leaves that to accelerate's backward pass.

    That would run it after every micro-batch, before the loss is known to be finite.
    """
    if is_engine(model):
        step: Any = model.step
        step()
