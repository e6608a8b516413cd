"""What `kvpref plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kvpref.cli.plan_command import Subject, has_optimizer, train_command
from kvpref.profiling.memory.tracker import VISION_CATEGORIES
from kvpref.profiling.prediction.fit import VariantPlan
from kvpref.profiling.prediction.model import TrainingSetup
from kvpref.profiling.prediction.passes import step_passes
from kvpref.profiling.prediction.peak import PeakPrediction, Predictor
from kvpref.profiling.prediction.ranks import Communication, Ranks, communication
from kvpref.profiling.prediction.step import GroupShape

NOT_CHECKED = (
    "Not compared with a GPU: buffers inside CUDA kernels (by PyTorch's sources) and sharding (by a formula). All else "
    "is counted as on the CPU, where predictions are tested against PyTorch's allocator. Fragmentation and the CUDA "
    "context are what --reserve is for."
)


PER_STEP = (
    "received is what reaches one rank in a step of --batch-size groups, by formula: weights that are gathered, "
    "gradients that are reduced, rows and heads that ranks exchange"
)
PURE_BF16 = (
    "--dtype bfloat16 trains weights of 8 bits of precision: a step below 1/512 of a weight is rounded away, as most "
    "are at common learning rates; kvpref train says how many. Weights in float32 with bf16 autocast are the default"
)
BF16_BASE = "the frozen weights are in bfloat16, the adapter's in float32"
FLOAT32_BASE = "--dtype bfloat16 halves the frozen weights; the adapter's stay in float32"


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """All variants of one model and one shape of groups."""

    subject: Subject
    plans: Sequence[VariantPlan]
    setup: TrainingSetup
    predictor: Predictor
    """Which made the plans."""

    shape: GroupShape
    """Of the groups."""

    groups_per_rank: int
    """Groups of a step, per rank or per ranks that share micro-batches."""

    budget_bytes: int
    """What a step may hold, the reserve taken off."""

    @property
    def ranks(self) -> Ranks:
        """Devices that train together."""
        return self.predictor.ranks

    def advice(self) -> list[str]:
        """What to change where nothing fits."""
        if any(plan.fits for plan in self.plans):
            return []
        resident, budget = self.plans[0].one_group.resident_bytes, self.budget_bytes
        advice = []
        if resident >= budget:
            advice.append(f"weights, gradients and optimizer state take {gib(resident)} of {gib(budget)}")
            if self.setup.lora_r is None:
                advice.append("train an adapter only: --lora-r 16")
            shards = max(2, -(-resident * self.ranks.world_size // budget))
            advice.append(f"share them among devices, more than {shards}: --world-size {2 * shards} --shard fsdp2")
        if any(plan.variant.checkpoint != "all" for plan in self.plans):
            advice.append("compute activations again: --checkpoint all")
        advice.append("shorter prompts or responses (--prompt-tokens, --response-tokens), in the bounded schedule")
        return advice

    def notes(self) -> list[str]:
        """What to know about the figures."""
        notes = []
        if self.setup.dtype != torch.float32:
            notes.append(PURE_BF16 if self.setup.lora_r is None else BF16_BASE)
        elif self.setup.lora_r is not None:
            notes.append(FLOAT32_BASE)
        if self.ranks.world_size > 1:
            notes.append(f"of {self.ranks.world_size} ranks each; {PER_STEP}")
        return [*notes, "the largest N of bounded continues the line through two predictions", NOT_CHECKED]

    def images(self) -> list[str]:
        """What images hold at the peak of one group."""
        found = []
        for plan in self.plans:
            held = plan.one_group.bytes_by_category
            parts = [f"{name} {gib(held[name])}" for name in VISION_CATEGORIES if name in held]
            if parts:
                found.append(f"{plan.name}: of one group's peak, {', '.join(parts)}")
        return found

    def communication(self, plan: VariantPlan) -> Communication | None:
        """What a rank receives in a step; None if it is alone or nothing fits."""
        if self.ranks.world_size == 1 or not plan.fits:
            return None
        passes = step_passes(plan, self.shape, self.groups_per_rank)
        predictor = self.predictor
        return communication(self.ranks, plan.variant, predictor.model_bytes, passes, predictor.heads_bytes)

    def received(self) -> list[str]:
        """The same in words."""
        lines = []
        for plan in self.plans:
            found = self.communication(plan)
            if found is None:
                continue
            parts = [
                f"{gib(num_bytes)} of {what} in {count} collectives"
                for num_bytes, what, count in (
                    (found.gathered_bytes, "weights", found.num_gathers),
                    (found.reduced_bytes, "gradients", found.num_reductions),
                    (found.exchanged_bytes, "rows and heads", found.num_exchanges),
                )
                if num_bytes
            ]
            lines.append(f"{plan.name}: received per step {', '.join(parts)}")
        return lines

    def show(self, title: str) -> None:
        """Print the table, and the command that runs what fits."""
        console = Console()
        console.print(self._table(title))
        for line in self.images():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        for line in self.received():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        for plan in self.plans:
            command = self.command(plan)
            if command is not None:
                console.print(f"{plan.name}: {command}", highlight=False, markup=False, soft_wrap=True)
        if not has_optimizer(self.setup):
            console.print(f"{self.setup.optimizer} is for kvpref.PreferenceTrainer(optimizers=...) in Python")
        for line in self.advice():
            console.print(f"nothing fits: {line}", highlight=False, soft_wrap=True)
        for line in self.notes():
            console.print(line, highlight=False, soft_wrap=True)

    def to_json(self) -> dict[str, Any]:
        """Everything shown, with the setup."""
        setup = {name: _plain(value) for name, value in asdict(self.setup).items()}
        return {
            "setup": setup,
            "ranks": {**asdict(self.ranks), "groups_per_rank": self.groups_per_rank},
            "budget_bytes": self.budget_bytes,
            "variants": [self._variant_json(plan) for plan in self.plans],
            "advice": self.advice(),
            "notes": self.notes(),
        }

    def command(self, plan: VariantPlan) -> str | None:
        """The command for the largest micro-batch that fits; None if none does, or `kvpref train` cannot do it."""
        if not plan.fits:
            return None
        return train_command(
            self.subject,
            self.setup,
            plan.variant,
            max_tokens=plan.max_tokens_per_micro_batch,
            ranks=self.ranks,
        )

    def _table(self, title: str) -> Table:
        table = Table(title=title, title_justify="left")
        # Words short enough for all columns to stand in a terminal of 80.
        for column in (
            "variant",
            "one group, GiB",
            "of it resident",
            "groups",
            "--max-tokens",
            "per chunk",
            "largest N",
        ):
            table.add_column(column, justify="left" if column == "variant" else "right")
        for plan in self.plans:
            more = {name: "+" if name in plan.at_limit else "" for name in ("groups", "responses")}
            table.add_row(
                plan.name,
                f"{plan.one_group.total_bytes / 2**30:.2f}",
                f"{plan.one_group.resident_bytes / 2**30:.2f}",
                f"{plan.num_groups}{more['groups']}" if plan.fits else "none",
                str(plan.max_tokens_per_micro_batch) if plan.fits else "",
                str(plan.variant.max_tokens_per_chunk or ""),
                f"{plan.max_responses}{more['responses']}",
            )
        return table

    def _variant_json(self, plan: VariantPlan) -> dict[str, Any]:
        return {
            "name": plan.name,
            **asdict(plan.variant),
            "one_group": asdict(plan.one_group),
            "fits": plan.fits,
            "num_groups": plan.num_groups,
            "max_tokens_per_micro_batch": plan.max_tokens_per_micro_batch,
            "largest_bytes": _total(plan.largest),
            "max_responses": plan.max_responses,
            "at_limit": plan.at_limit,
            "communication": None if (found := self.communication(plan)) is None else asdict(found),
            "command": self.command(plan),
        }


def describe(shape: GroupShape) -> str:
    """The lengths in words."""
    images = ""
    if shape.start is not None:
        count = len(shape.start.images)
        images = f" ({shape.start.num_image_tokens} of them of {count} image{'s' if count > 1 else ''})"
    return f"{shape.prompt_tokens} prompt tokens{images}, {shape.num_responses} responses of {shape.response_tokens}"


def gib(num_bytes: int) -> str:
    """Bytes as text."""
    return f"{num_bytes / 2**30:.2f} GiB"


def _plain(value: Any) -> Any:
    """A dtype by its name, all else as it is."""
    return value if value is None or isinstance(value, str | int) else str(value).removeprefix("torch.")


def _total(peak: PeakPrediction | None) -> int | None:
    return None if peak is None else peak.total_bytes
