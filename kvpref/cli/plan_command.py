"""The `kvpref train` command that runs what was planned."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from kvpref.engine.options import EngineOptions
from kvpref.profiling.prediction.model import TrainingSetup
from kvpref.training.adapters import ALL_LINEAR

_OPTIMIZERS: dict[str, list[str] | None] = {"adamw": [], "sgd": ["--set", "optim=sgd"], "sgd_momentum": None}
"""By the plan's name: what chooses it; None where `kvpref train` has no such optimizer."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is to be trained, as the plan's command line named it."""

    model: str
    """CONFIG.json, a folder or a hub name."""

    data: str | None
    """Where the lengths are from, if from data."""

    tokenizer: str | None
    """If it is not the model's own."""

    def arguments(self, *, adapter: bool) -> list[str]:
        """The first arguments of `kvpref train`; names in capitals are for the user to fill in.

        Args:
            adapter: Whether an adapter is trained, which needs a base model with weights.
        """
        data, model = self.data or "DATA", Path(self.model)
        if model.suffix != ".json":
            named = [self.model, data]
        elif model.name == "config.json":
            named = [str(model.parent), data]
        elif adapter:
            named = ["MODEL", data]
        else:
            named = [data, "--config", self.model]
        tokenizer = self.tokenizer or ("TOKENIZER" if "--config" in named else None)
        return [*named, *([] if tokenizer is None else ["--tokenizer", tokenizer]), "--output", "OUT"]


def train_command(
    subject: Subject, setup: TrainingSetup, variant: EngineOptions, *, max_tokens: int, num_shards: int = 1
) -> str | None:
    """The whole command, as a shell takes it; None if `kvpref train` cannot do it.

    Args:
        subject: What is trained.
        setup: As it was planned.
        variant: The same, with the bounds that were found.
        max_tokens: The token budget of a micro-batch.
        num_shards: Devices that share the model.
    """
    optimizer = _OPTIMIZERS[setup.optimizer]
    if optimizer is None:
        return None
    start = ["kvpref", "train"]
    shards: list[str] = []
    if num_shards > 1:
        start = ["torchrun", "--nproc-per-node", str(num_shards), "-m", "kvpref", "train"]
        shards = ["--set", "fsdp=full_shard"]
    flags = [*_adapter_flags(setup), *_variant_flags(variant), "--max-tokens", str(max_tokens)]
    return shlex.join(
        [
            *start,
            *subject.arguments(adapter=setup.lora_r is not None),
            *flags,
            *_precision_flags(setup),
            *optimizer,
            *shards,
        ]
    )


def has_optimizer(setup: TrainingSetup) -> bool:
    """Whether `kvpref train` has the optimizer that was planned for."""
    return _OPTIMIZERS[setup.optimizer] is not None


def _adapter_flags(setup: TrainingSetup) -> list[str]:
    if setup.lora_r is None:
        return []
    targets = setup.lora_target_modules
    return ["--lora-r", str(setup.lora_r), *([] if targets == ALL_LINEAR else ["--lora-target-modules", targets])]


def _variant_flags(variant: EngineOptions) -> list[str]:
    flags = ["--mode", variant.mode]
    if variant.schedule == "bounded":
        flags += ["--schedule", "bounded", "--max-tokens-per-chunk", str(variant.max_tokens_per_chunk)]
        flags += ["--prefix-cache", variant.prefix_cache]
    return [*flags, "--checkpoint", variant.checkpoint]


def _precision_flags(setup: TrainingSetup) -> list[str]:
    # Always named: the default depends on the machine.
    autocast = "--no-bf16" if setup.mixed_precision is None else "--bf16"
    flags = ["--dtype", str(setup.dtype).removeprefix("torch."), autocast]
    return [*flags, "--set", "use_cpu=true"] if setup.device_type == "cpu" else flags
