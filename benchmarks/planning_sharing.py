"""What keeping groups that begin alike in one step spares: unique tokens counted by the prefix tree, on real files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from statistics import fmean
from typing import Any

from rich.table import Table

from kvpref.data import Clusters, CostModel, PreferenceDataset, StepOptions, StepPlanner, summarize_batches
from kvpref.prefix.tree import build_tree

GROUPS_PER_STEP = 16
BUDGET = 16384
WORLD_SIZES = (1, 8)
MIN_SHARED_TOKENS = 16
"""What training takes by default."""


def compare_sharing(datasets: dict[str, PreferenceDataset], cost_model: CostModel) -> Iterator[dict[str, Any]]:
    """One row per file, world size, and with or without clusters: mode two_pass, the first epoch."""
    for (name, dataset), world_size in product(datasets.items(), WORLD_SIZES):
        found = dataset.clusters(GROUPS_PER_STEP, MIN_SHARED_TOKENS)
        before = None
        for clusters in (None, found):
            counts = _count(dataset, world_size, clusters, cost_model)
            before = before or counts
            yield {
                "data": name,
                "world_size": world_size,
                "together": clusters is not None,
                "num_sharing_groups": found.num_sharing_groups,
                "largest_cluster": found.largest,
                **counts,
                "fewer_tokens_of_steps": before["tokens_per_step"] / counts["tokens_per_step"],
                "fewer_tokens_of_micro_batches": before["micro_batch_tokens"] / counts["micro_batch_tokens"],
            }


def _count(
    dataset: PreferenceDataset, world_size: int, clusters: Clusters | None, cost_model: CostModel
) -> dict[str, float]:
    """Tokens of an epoch, where a step encodes what its groups share once, and where each micro-batch does."""
    budget = max(BUDGET, *(lengths.unique_tokens for lengths in dataset.lengths))
    options = StepOptions(groups_per_step=GROUPS_PER_STEP, world_size=world_size, max_tokens_per_micro_batch=budget)
    planner = StepPlanner(dataset.lengths, options, cost_model=cost_model, clusters=clusters)
    steps = [[micro_batch for rank in step for micro_batch in rank] for step in planner.steps(0)]
    in_steps = [
        _unique_tokens(dataset, [group for item in step if not item.is_filler for group in item.group_indices])
        for step in steps
    ]
    batches = summarize_batches(planner)
    return {
        "tokens_per_step": fmean(in_steps),
        "num_micro_batches": batches.num_micro_batches,
        "micro_batch_tokens": sum(_unique_tokens(dataset, item.group_indices) for step in steps for item in step),
        "costliest_micro_batches_per_step": batches.costliest_micro_batches_per_step,
    }


def _unique_tokens(dataset: PreferenceDataset, groups: list[int] | tuple[int, ...]) -> int:
    sequences = [sequence.input_ids for group in groups for sequence in dataset[group].sequences]
    return build_tree(sequences, min_shared_tokens=MIN_SHARED_TOKENS).num_unique_tokens


def sharing_table(rows: list[dict[str, Any]]) -> Table:
    """The same rows as a table."""
    table = Table(title=f"groups that begin alike: steps of {GROUPS_PER_STEP}, budget {BUDGET}", title_justify="left")
    for column in ("data", "ranks", "plan", "groups that share", "unique tokens per step", "micro-batches"):
        table.add_column(column)
    table.add_column("tokens of all micro-batches")
    table.add_column("FLOPs per step, waiting always")
    for row in rows:
        table.add_row(
            *(row["data"], str(row["world_size"]), "together" if row["together"] else "apart"),
            f"{row['num_sharing_groups']} (largest {row['largest_cluster']})",
            f"{row['tokens_per_step']:.0f} ({row['fewer_tokens_of_steps']:.2f}x fewer)",
            str(row["num_micro_batches"]),
            f"{row['micro_batch_tokens']} ({row['fewer_tokens_of_micro_batches']:.2f}x fewer)",
            f"{row['costliest_micro_batches_per_step']:.3g}",
        )
    return table
