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
from kvpref.profiling.prediction.peak import PeakPrediction
from kvpref.profiling.prediction.step import GroupShape

NOT_CHECKED = (
    "Not compared with a GPU: buffers inside CUDA kernels (by PyTorch's sources) and sharding (by a formula). All else "
    "is counted as on the CPU, where predictions are tested against PyTorch's allocator. Fragmentation and the CUDA "
    "context are what --reserve is for."
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
    num_shards: int
    budget_bytes: int
    """What a step may hold, the reserve taken off."""

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
            shards = max(2, -(-resident * self.num_shards // budget))
            advice.append(f"share them among devices, more than {shards}: --num-shards {2 * shards}")
        if any(plan.variant.checkpoint != "all" for plan in self.plans):
            advice.append("compute activations again: --checkpoint all")
        where = ", in the bounded schedule" if self.num_shards == 1 else ""
        advice.append(f"shorter prompts or responses (--prompt-tokens, --response-tokens){where}")
        return advice

    def notes(self) -> list[str]:
        """What to know about the figures."""
        notes = []
        if self.setup.dtype != torch.float32:
            notes.append(PURE_BF16 if self.setup.lora_r is None else BF16_BASE)
        elif self.setup.lora_r is not None:
            notes.append(FLOAT32_BASE)
        if self.num_shards > 1:
            return [*notes, "bounded is left out: it does not run sharded models", NOT_CHECKED]
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

    def show(self, title: str) -> None:
        """Print the table, and the command that runs what fits."""
        console = Console()
        console.print(self._table(title))
        for line in self.images():
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
            "setup": {**setup, "num_shards": self.num_shards},
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
            num_shards=self.num_shards,
        )

    def _table(self, title: str) -> Table:
        table = Table(title=title, title_justify="left")
        for column in ("variant", "one group", "of it resident", "groups", "--max-tokens", "per chunk", "largest N"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        for plan in self.plans:
            more = {name: "+" if name in plan.at_limit else "" for name in ("groups", "responses")}
            table.add_row(
                plan.name,
                gib(plan.one_group.total_bytes),
                gib(plan.one_group.resident_bytes),
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
