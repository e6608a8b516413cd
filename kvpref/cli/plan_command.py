"""The `kvpref train` command that runs what was planned."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from kvpref.cli.given_data import GivenData
from kvpref.engine.options import EngineOptions
from kvpref.models.lora_targets import ALL_LINEAR
from kvpref.profiling.prediction.model import TrainingSetup
from kvpref.profiling.prediction.ranks import Ranks

_OPTIMIZERS: dict[str, list[str] | None] = {"adamw": [], "sgd": ["--set", "optim=sgd"], "sgd_momentum": None}
"""By the plan's name: what chooses it; None where `kvpref train` has no such optimizer."""


_ONE_MACHINE = 8
"""Devices that one machine is taken to have."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is to be trained, as the plan's command line named it."""

    model: str
    """CONFIG.json, a folder or a hub name."""

    data: GivenData | None
    """Where the lengths are from, if from data."""

    tokenizer: str | None
    """If it is not the model's own."""

    def arguments(self, *, adapter: bool) -> list[str]:
        """The first arguments of `kvpref train`; names in capitals are for the user to fill in.

        Args:
            adapter: Whether an adapter is trained, which needs a base model with weights.
        """
        data, model = ["DATA"] if self.data is None else self.data.arguments(), Path(self.model)
        if model.suffix != ".json":
            named = [self.model, *data]
        elif model.name == "config.json":
            named = [str(model.parent), *data]
        elif adapter:
            named = ["MODEL", *data]
        else:
            named = [*data, "--model-config", self.model]
        tokenizer = self.tokenizer or ("TOKENIZER" if "--model-config" in named else None)
        return [*named, *([] if tokenizer is None else ["--tokenizer", tokenizer]), "--output", "OUT"]


def train_command(
    subject: Subject, setup: TrainingSetup, variant: EngineOptions, *, max_tokens: int, ranks: Ranks | None = None
) -> str | None:
    """The whole command, as a shell takes it; None if `kvpref train` cannot do it.

    Args:
        subject: What is trained.
        setup: As it was planned.
        variant: The same, with the bounds that were found.
        max_tokens: The token budget of a micro-batch.
        ranks: Devices that train together.
    """
    optimizer = _OPTIMIZERS[setup.optimizer]
    if optimizer is None:
        return None
    ranks = ranks or Ranks()
    start, shards = ["kvpref", "train"], _rank_flags(ranks, variant)
    if ranks.world_size > _ONE_MACHINE:
        machines = ["torchrun", "--nnodes", str(-(-ranks.world_size // _ONE_MACHINE))]
        start = [*machines, "--nproc-per-node", str(_ONE_MACHINE), "-m", "kvpref", "train"]
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


def _rank_flags(ranks: Ranks, variant: EngineOptions) -> list[str]:
    if ranks.world_size == 1:
        return []
    flags = [] if ranks.world_size > _ONE_MACHINE else ["--num-processes", str(ranks.world_size)]
    flags += ["--accelerate-config", ranks.shard]
    changed = {
        name: value
        for name, value, default in (
            ("gather_weights", variant.gather_weights, "chunk"),
            ("reduce_grads", variant.reduce_grads, "chunk"),
            ("sequence_parallel", ranks.sequence_parallel, 1),
        )
        if value != default
    }
    return [*flags, *(part for name, value in changed.items() for part in ("--set", f"{name}={value}"))]


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
