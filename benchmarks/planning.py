"""How steps are cut into micro-batches: rules compared on real files, and what sorting by length does for padding.

Counts only, so the same everywhere; costs are the FLOPs of a Llama of 8 x 384 with a vocabulary of 50k. With
`--measure` a slice of two files is also run, on a tiny model, and the measured ratios stand beside the predicted ones.

    python benchmarks/planning.py --measure
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby, product
from pathlib import Path
from statistics import fmean, geometric_mean, median
from typing import Any

import torch
from models import LONG_CONTEXT, SMALL, build_model
from options import SweepOptions
from places import results_folder
from planning_rules import RULES_OF_MODE, planner_with
from planning_sharing import compare_sharing, sharing_table
from rich.console import Console
from rich.table import Table

from kvpref import Group, LossOutput, Sequence, collate, forward_backward
from kvpref.data import (
    BatchStatistics,
    CostModel,
    PreferenceDataset,
    StepOptions,
    StepPlanner,
    load_preferences,
    load_tokenizer,
    summarize_batches,
)
from kvpref.models.shape import model_shape
from kvpref.profiling.calibration import calibrate
from kvpref.profiling.provenance import Provenance
from kvpref.profiling.timing import TimingOptions, time_rounds

FILES = {
    "hh_harmless": "hh_harmless_pairs",
    "mixed": "mixed_pairs",
    "gsm8k": "gsm8k_groups",
    "game24": "game24_groups",
    "squality flat": "squality_groups",
    "pandalm": "pandalm_groups",
}
FIELDS = ("mode", "world_size", "num_micro_batches", "num_fillers", "budget_fill", "padding_share", "imbalance")
FIELDS += ("costliest_rank_per_step", "costliest_micro_batches_per_step")
"""What is kept of `BatchStatistics`."""

MEASURED_FILES = ("hh_harmless", "pandalm")
WORLD_SIZES = (1, 2, 8)
GROUPS_PER_STEP = (16, 64)
BUDGETS = (1.0, 2.0, 4.0)
"""Token budgets, as multiples of the largest group of the file in the mode at hand."""

BATCHINGS = {
    "padded": ("padded", 1),
    "padded, sorted": ("padded", 16),
    "packed": ("packed", 16),
    "two_pass": ("two_pass", 16),
}
"""Mode, and the steps within which groups are sorted by length; 1 leaves steps a random choice."""


def compare_rules(datasets: dict[str, PreferenceDataset], cost_model: CostModel) -> Iterator[dict[str, Any]]:
    """One row per file, mode, step size, world size, budget and rule."""
    for (name, dataset), mode in product(datasets.items(), RULES_OF_MODE):
        largest = max(StepPlanner(dataset.lengths, StepOptions(groups_per_step=1, mode=mode)).costs.tokens)
        for groups_per_step, world_size, factor in product(GROUPS_PER_STEP, WORLD_SIZES, BUDGETS):
            options = StepOptions(
                groups_per_step=groups_per_step,
                world_size=world_size,
                mode=mode,
                max_tokens_per_micro_batch=int(factor * largest),
            )
            for rule in RULES_OF_MODE[mode]:
                planner = planner_with(rule)(dataset.lengths, options, cost_model=cost_model)
                batches = asdict(summarize_batches(planner))
                key = {"data": name, "groups_per_step": groups_per_step, "budget": int(factor * largest)}
                yield key | {"rule": rule} | {field: batches[field] for field in FIELDS}


def rules_table(rows: list[dict[str, Any]]) -> Table:
    """Means over files, step sizes and budgets; step costs against the first rule of the mode."""
    table = Table(title="rules: means over files, groups per step and budgets", title_justify="left")
    for column in ("mode", "ranks", "rule", "micro-batches", "budget fill", "padding", "imbalance"):
        table.add_column(column)
    table.add_column("step, waiting at its end")
    table.add_column("step, waiting always")

    def place(row: dict[str, Any]) -> tuple[str, int]:
        return row["mode"], row["world_size"]

    for (mode, world_size), cell in groupby(sorted(rows, key=place), key=place):
        of_rule = {rule: [] for rule in RULES_OF_MODE[mode]}
        for row in cell:
            of_rule[row["rule"]].append(row)
        before = of_rule[RULES_OF_MODE[mode][0]]
        for rule, own in of_rule.items():
            ratios = [
                geometric_mean(row[name] / first[name] for row, first in zip(own, before, strict=True))
                for name in ("costliest_rank_per_step", "costliest_micro_batches_per_step")
            ]
            table.add_row(
                *(mode, str(world_size), rule, str(sum(row["num_micro_batches"] for row in own))),
                *(f"{fmean(row[name] for row in own):.1%}" for name in ("budget_fill", "padding_share", "imbalance")),
                *(f"{ratio:.3f}" for ratio in ratios),
            )
    return table


def compare_sorting(datasets: dict[str, PreferenceDataset], cost_model: CostModel) -> list[dict[str, Any]]:
    """Tokens and cost of an epoch in micro-batches of 16 groups, against padded rows in random order."""
    rows = []
    for name, dataset in datasets.items():
        epochs = {
            batching: _epoch(summarize_batches(_one_batch_planner(dataset, batching, 16, cost_model)))
            for batching in BATCHINGS
        }
        for batching, (tokens, padding, cost) in epochs.items():
            baseline = epochs["padded"]
            rows.append(
                {"data": name, "batching": batching, "tokens": tokens, "padding_share": padding, "flops": cost}
                | {"fewer_tokens": baseline[0] / tokens, "less_cost": baseline[2] / cost}
            )
    return rows


def _one_batch_planner(
    dataset: PreferenceDataset, batching: str, groups_per_step: int, cost_model: CostModel
) -> StepPlanner:
    """Each step is one micro-batch, so that padding depends on the order alone."""
    mode, window_steps = BATCHINGS[batching]
    options = StepOptions(groups_per_step=groups_per_step, mode=mode, window_steps=window_steps)  # type: ignore[arg-type]
    return StepPlanner(dataset.lengths, options, cost_model=cost_model)


def _epoch(batches: BatchStatistics) -> tuple[int, float, float]:
    tokens = round(batches.tokens_per_micro_batch.mean * batches.num_micro_batches)
    return tokens, batches.padding_share, batches.costliest_rank_per_step * batches.num_steps


def sorting_table(rows: list[dict[str, Any]]) -> Table:
    """The same rows as a table."""
    table = Table(title="an epoch in micro-batches of 16 groups, against padded in random order", title_justify="left")
    for column in ("data", "batching", "tokens processed", "padding", "fewer tokens", "fewer FLOPs"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            *(row["data"], row["batching"], str(row["tokens"]), f"{row['padding_share']:.1%}"),
            *(f"{row['fewer_tokens']:.2f}x", f"{row['less_cost']:.2f}x"),
        )
    return table


def measure(datasets: dict[str, PreferenceDataset], options: SweepOptions, num_groups: int) -> list[dict[str, Any]]:
    """Forward and backward of an epoch over a slice of each file, the batchings taking turns."""
    model = build_model(LONG_CONTEXT, options)
    flops = CostModel.from_shape(model_shape(model))
    seconds = {mode: calibrate(model, mode=mode).cost_model for mode in ("padded", "packed", "two_pass")}
    rows = []
    for name in MEASURED_FILES:
        # Every so many groups, so that the slice has the file's spread of lengths.
        stride = max(1, len(datasets[name]) // num_groups)
        slice_ = PreferenceDataset(_small_vocabulary(datasets[name][i * stride]) for i in range(num_groups))
        cases, predicted = {}, {}
        for batching, (mode, _) in BATCHINGS.items():
            planner = _one_batch_planner(slice_, batching, 8, flops)
            runs = [micro_batch.group_indices for step in planner.steps(0) for micro_batch in step[0]]
            batches = [collate([slice_[index] for index in run], modes=(mode,)) for run in runs]
            cases[batching] = lambda batches=batches, mode=mode: _run(model, batches, mode)
            priced = summarize_batches(planner, seconds[mode])
            cost = summarize_batches(planner).costliest_rank_per_step
            predicted[batching] = (cost, priced.costliest_rank_per_step * priced.num_steps)
        times = time_rounds(cases, options.device, TimingOptions(num_rounds=5))
        for batching, own in times.items():
            rows.append(
                {
                    "data": name,
                    "batching": batching,
                    "seconds": [value / 1000 for value in own],
                    "predicted_seconds": predicted[batching][1],
                    "measured_ratio": median(p / t for p, t in zip(times["padded"], own, strict=True)),
                    "ratio_of_flops": predicted["padded"][0] / predicted[batching][0],
                    "ratio_of_calibrated_seconds": predicted["padded"][1] / predicted[batching][1],
                }
            )
    return rows


def _small_vocabulary(group: Group) -> Group:
    """Token ids modulo the tiny model's vocabulary; equal beginnings stay equal."""
    size = LONG_CONTEXT.vocab_size
    return Group([Sequence([token % size for token in s.input_ids], s.scored) for s in group.sequences])


def _run(model: Any, batches: list[Any], mode: str) -> None:
    for batch in batches:
        model.zero_grad()
        forward_backward(model, batch, lambda policy, *_: LossOutput(loss=-policy.sum().mean(), metrics={}), mode=mode)


def measured_table(rows: list[dict[str, Any]]) -> Table:
    """The same rows as a table."""
    table = Table(title="forward and backward of a slice, times faster than padded in random order")
    for column in ("data", "batching", "seconds (median)", "predicted s", "measured", "by FLOPs", "by calibration"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            *(row["data"], row["batching"], f"{median(row['seconds']):.2f}", f"{row['predicted_seconds']:.2f}"),
            *(f"{row[name]:.2f}x" for name in ("measured_ratio", "ratio_of_flops", "ratio_of_calibrated_seconds")),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="folder with data/ and tokenizers/; default: KVPREF_SHARED")
    parser.add_argument("--measure", action="store_true", help="also run slices of two files")
    parser.add_argument("--groups", type=int, default=48, help="groups of a measured slice")
    args = parser.parse_args()

    options = SweepOptions(device=torch.device("cpu"), shared=args.shared)
    tokenizer = load_tokenizer(str(options.shared_file("tokenizers/gpt_neox_20b")))
    datasets = {
        name: load_preferences(str(options.shared_file(f"data/{file}.jsonl")), tokenizer)
        for name, file in FILES.items()
    }
    cost_model = CostModel.from_shape(model_shape(build_model(SMALL, options)))
    console = Console(width=150)
    rules = list(compare_rules(datasets, cost_model))
    console.print(rules_table(rules))
    sorting = compare_sorting(datasets, cost_model)
    console.print(sorting_table(sorting))
    sharing = list(compare_sharing(datasets, cost_model))
    console.print(sharing_table(sharing))
    measured = measure(datasets, options, args.groups) if args.measure else []
    if measured:
        console.print(measured_table(measured))
    report = {
        "provenance": asdict(Provenance.collect(options.device)),
        "sizes_of_costs": asdict(SMALL),
        "rules": rules,
        "sorting": sorting,
        "sharing": sharing,
        "sizes_of_measured": asdict(LONG_CONTEXT),
        "measured": measured,
    }
    path = results_folder(keep=args.measure) / "planning.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # A row per line keeps the file short.
    lines = ",\n".join(json.dumps(row) for row in report.pop("rules"))
    path.write_text(json.dumps(report, indent=1)[:-2] + ',\n "rules": [\n' + lines + "\n]\n}\n")


if __name__ == "__main__":
    main()
