"""What `kvpref plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from kvpref.profiling.prediction_fit import VariantPlan
from kvpref.profiling.prediction_model import TrainingSetup
from kvpref.profiling.prediction_peak import PeakPrediction
from kvpref.profiling.prediction_step import GroupShape

NOT_CHECKED = (
    "Not compared with a GPU: buffers inside CUDA kernels (by PyTorch's sources) and sharding (by a formula). All else "
    "is counted as on the CPU, where predictions are tested against PyTorch's allocator. Fragmentation and the CUDA "
    "context are what --reserve is for."
)


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """All variants of one model and one shape of groups."""

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
            if self.setup.lora_rank is None:
                advice.append("train adapters only: --lora-rank 16")
            shards = max(2, -(-resident * self.num_shards // budget))
            advice.append(f"share them among devices, more than {shards}: --num-shards {2 * shards}")
        if any(plan.variant.checkpoint != "all" for plan in self.plans):
            advice.append("compute activations again: --checkpoint all")
        where = ", in the bounded schedule" if self.num_shards == 1 else ""
        advice.append(f"shorter prompts or responses (--prompt-tokens, --response-tokens){where}")
        return advice

    def notes(self) -> list[str]:
        """What to know about the figures."""
        if self.num_shards > 1:
            return ["bounded is left out: it does not run sharded models", NOT_CHECKED]
        return ["the largest N of bounded continues the line through two predictions", NOT_CHECKED]

    def show(self, title: str) -> None:
        """Print the table, and the arguments of `kvpref train` for what fits."""
        console = Console()
        console.print(self._table(title))
        for plan in self.plans:
            if plan.fits:
                console.print(f"{plan.name}: kvpref train {self.train_flags(plan)}", highlight=False, soft_wrap=True)
        if self.setup.lora_rank is not None:
            console.print("adapters are made in Python: peft.get_peft_model, then kvpref.PreferenceTrainer")
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

    def train_flags(self, plan: VariantPlan) -> str:
        """Arguments of `kvpref train` for the largest micro-batch that fits."""
        variant = plan.variant
        flags = ["--mode", variant.mode, "--max-tokens", str(plan.max_tokens_per_micro_batch)]
        if variant.schedule == "bounded":
            flags += ["--schedule", "bounded", "--max-tokens-per-chunk", str(variant.max_tokens_per_chunk)]
        if variant.prefix_cache != "device":
            flags += ["--prefix-cache", variant.prefix_cache]
        if variant.checkpoint != "none":
            flags += ["--checkpoint", variant.checkpoint]
        flags += ["--dtype", _plain(self.setup.dtype)]
        if self.setup.mixed_precision is not None:
            flags.append("--bf16")
        return " ".join(flags)

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
            "train_flags": self.train_flags(plan) if plan.fits else None,
        }


def describe(shape: GroupShape) -> str:
    """The lengths in words."""
    return f"{shape.prompt_tokens} prompt tokens, {shape.num_responses} responses of {shape.response_tokens}"


def gib(num_bytes: int) -> str:
    """Bytes as text."""
    return f"{num_bytes / 2**30:.2f} GiB"


def _plain(value: Any) -> Any:
    """A dtype by its name, all else as it is."""
    return value if value is None or isinstance(value, str | int) else str(value).removeprefix("torch.")


def _total(peak: PeakPrediction | None) -> int | None:
    return None if peak is None else peak.total_bytes
