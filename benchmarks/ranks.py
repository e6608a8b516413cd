"""Simulates plans of 8, 64 and 512 ranks on real files with the cost model: how long ranks wait for one another.

    python benchmarks/ranks.py            # minutes; writes results/ranks.json and docs/ranks.png
    python benchmarks/ranks.py --quick    # 8 ranks, two files

Nothing runs on a device. Costs are the FLOPs of an 8B model; see `rank_waits.py` for the simulation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from options import SweepOptions
from places import ROOT, results_folder
from rank_files import FILES, Measured, RealGroups
from rank_plans import Plan, Sizes, as_they_come, balanced, default_tokens
from rank_plot import plot
from rank_waits import Played, Player
from rich.console import Console
from rich.table import Table

from kvpref.data import BatchedStep, CostModel, Waits
from kvpref.data.batching.group_costs import WAITS
from kvpref.profiling.prediction.model import TrainingSetup, build_fake_training
from kvpref.profiling.provenance import Provenance

CONFIG = ROOT / "tests" / "configs" / "llama_3_1_8b.json"
RANKS = (8, 64, 512)
GROUPS_PER_RANK = (1, 2, 4, 8)
BUDGETS = (1, 4)
"""Tokens of a micro-batch, as multiples of the default."""
BAR = 1.05
Play = Callable[[Player, BatchedStep], Played]
SCHEDULES: dict[str, tuple[Waits, Play]] = {
    "step": ("step", Player.waits_at_the_end),
    "full": ("micro_batch", Player.full),
    "bounded": ("pass", Player.bounded),
}
"""Simulated schedules: what the plan is balanced for, and how it runs. ``step`` is DDP in any schedule, and ``bounded``
with weights that stay gathered."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One file on a number of ranks, in one schedule; means over the steps."""

    file: str
    num_ranks: int
    groups_per_rank: int
    budget: int
    """Most tokens of a micro-batch."""
    copies: int
    """How often the file's groups are repeated, as if they were different groups of the same lengths."""
    schedule: str
    ratio: float
    """Time of steps, over the time if the same work were spread evenly."""
    bound: float
    """Lower bound of the ratio, as no group is divided: the costliest group of a step over the mean."""
    last_ratio: float | None
    """Ratio of the epoch's last step, if it has fewer groups."""
    unbalanced_ratio: float
    """Ratio of a random order, dealt as it comes."""
    speedup: float
    """How many times longer the epoch takes in that order."""
    idle_share: float
    """Share of the ranks' time spent waiting."""
    unbalanced_idle_share: float
    micro_batches_per_rank: float
    dummy_share: float
    """Dummies per real pass."""
    unbalanced_dummy_share: float
    gathers_per_step: float
    """Collectives that gather one layer, on each rank."""
    reductions_per_step: float
    us_per_group: float
    """Planning, in microseconds of one processor."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shared", type=Path, help="Folder with data/ and tokenizers/.")
    arguments.add_argument("--quick", action="store_true", help="8 ranks and two files.")
    given = arguments.parse_args()
    shared = SweepOptions(device=torch.device("cpu"), shared=given.shared).shared_file("data").parent
    console = Console(width=150)
    cost_model, num_layers = model_costs()
    rows = []
    for row in play_all(RealGroups(shared), cost_model, num_layers, quick=given.quick):
        rows.append(row)
        console.print(f"{row.file} {row.num_ranks}x{row.groups_per_rank} {row.schedule}: {row.ratio:.3f}")
    console.print(table(rows))
    folder = results_folder(keep=not given.quick)
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "provenance": asdict(Provenance.collect(torch.device("cpu"))),
        "config": CONFIG.name,
        "bar": BAR,
        "rows": list(map(asdict, rows)),
    }
    (folder / "ranks.json").write_text(json.dumps(result, indent=1) + "\n")
    if not given.quick:
        plot(rows, ROOT / "docs" / "ranks.png")


def model_costs() -> tuple[CostModel, int]:
    """FLOPs of the 8B model, and its number of layers."""
    from kvpref.cli.loading import load_config
    from kvpref.models.shape import model_shape

    config: Any = load_config(str(CONFIG))
    model = build_fake_training(config, TrainingSetup()).model
    return CostModel.from_shape(model_shape(model)), config.num_hidden_layers


def play_all(groups: RealGroups, cost_model: CostModel, num_layers: int, *, quick: bool) -> Iterator[Row]:
    """All rows."""
    for name in list(FILES)[: 2 if quick else None]:
        for num_ranks in RANKS[: 1 if quick else None]:
            # The effect of groups per rank and of micro-batch sizes is shown for one number of ranks.
            shows_all = num_ranks == 64
            for groups_per_rank in GROUPS_PER_RANK if shows_all else GROUPS_PER_RANK[-1:]:
                files = groups.measured(name, num_ranks * groups_per_rank)
                for factor in BUDGETS if shows_all and groups_per_rank == GROUPS_PER_RANK[-1] else BUDGETS[:1]:
                    sizes = Sizes(
                        num_ranks=num_ranks, groups_per_rank=groups_per_rank, budget=factor * default_tokens(files)
                    )
                    yield from play(name, files, cost_model, num_layers, sizes)


def play(name: str, files: Measured, cost_model: CostModel, num_layers: int, sizes: Sizes) -> Iterator[Row]:
    """The rows of one file and number of ranks."""
    unbalanced = as_they_come(files, cost_model, sizes)
    plans = {waits: balanced(files, cost_model, sizes, waits) for waits in WAITS}
    players = {id(plan): Player(plan.costs, num_layers) for plan in (unbalanced, *plans.values())}
    for schedule, (waits, run) in SCHEDULES.items():
        plan = plans[waits]
        played, before = ([run(players[id(own)], step) for step in own.steps] for own in (plan, unbalanced))
        last = None if plan.last is None else run(players[id(plan)], plan.last)
        yield Row(
            file=name,
            **asdict(sizes),
            copies=files.copies,
            schedule=schedule,
            ratio=_ratio(played),
            bound=fmean(_bound(plan, step, own) for step, own in zip(plan.steps, played, strict=True)),
            last_ratio=None if last is None else last.time / last.work,
            unbalanced_ratio=_ratio(before),
            speedup=sum(own.time for own in before) / sum(own.time for own in played),
            idle_share=1 - 1 / _ratio(played),
            unbalanced_idle_share=1 - 1 / _ratio(before),
            micro_batches_per_rank=fmean(len(step[0]) for step in plan.steps),
            dummy_share=_dummies(played),
            unbalanced_dummy_share=_dummies(before),
            gathers_per_step=fmean(own.num_gathers for own in played),
            reductions_per_step=fmean(own.num_reductions for own in played),
            us_per_group=plan.us_per_group,
        )


def _ratio(played: list[Played]) -> float:
    return sum(own.time for own in played) / sum(own.work for own in played)


def _bound(plan: Plan, step: BatchedStep, played: Played) -> float:
    costliest = max(plan.costs.costs[group] for rank in step for item in rank for group in item.group_indices)
    return max(1.0, costliest / played.work)


def _dummies(played: list[Played]) -> float:
    return sum(own.num_dummies for own in played) / max(1, sum(own.num_passes for own in played))


def table(rows: list[Row]) -> Table:
    """The main figures."""
    found = Table()
    for column in (
        "file",
        "ranks",
        "groups",
        "budget",
        "waits",
        "step / even",
        "bound",
        "as they come",
        "faster",
        "dummies",
        "us",
    ):
        found.add_column(column, justify="left" if column in ("file", "waits") else "right")
    for row in rows:
        found.add_row(
            row.file,
            str(row.num_ranks),
            str(row.groups_per_rank),
            str(row.budget),
            row.schedule,
            f"{row.ratio:.3f}",
            f"{row.bound:.3f}",
            f"{row.unbalanced_ratio:.3f}",
            f"{row.speedup:.2f}",
            f"{row.dummy_share:.1%}",
            f"{row.us_per_group:.0f}",
        )
    return found


if __name__ == "__main__":
    main()
