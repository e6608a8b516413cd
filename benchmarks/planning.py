"""What planning costs: microseconds per unique token for the prefix tree, the layout and the tensors of a plan.

    python benchmarks/planning.py                                  # writes results/planning.json
    python benchmarks/planning.py --batch trajectories --mode bounded --profile
    python benchmarks/planning.py --dry-run

Sequences are rebuilt before every round, as for a data worker, so that nothing is cached in them.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import json
import pstats
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from options import MissingDataError, SweepOptions
from places import results_folder
from trajectory_data import made_up_trajectories, read_trajectories
from workloads import Shape, make_groups

from kvpref import Group, collate, join_batches
from kvpref import Sequence as TokenSequence
from kvpref.engine.options import DEFAULT_MAX_TOKENS_PER_CHUNK
from kvpref.profiling.provenance import Provenance
from kvpref.profiling.timing import CLOCKS

BAR_US = 0.3
"""Microseconds per unique token."""

RESPONSES = Shape(prompt=4000, response=2000, responses=16, groups=16)
"""Shape of the batch of that name; the others are whole datasets."""

NUM_ROUNDS = 5
BUDGET_S = 20.0
"""No new round starts after this many seconds."""

MICRO_BATCHES = 4

STAGES: Mapping[str, Sequence[str]] = {
    "tree": ("kvpref.plan.sharing:build_tree",),
    "layout": (
        "kvpref.plan.modes:build_layout",
        "kvpref.plan.modes:level_segments",
        "kvpref.plan.chunks:build_layout",
        "kvpref.plan.chunks:build_chunks",
    ),
}
"""Stage -> the functions, by where they are called, whose time it counts; the rest is tensors and records."""

Batches = Callable[[], list[Group]]


def batches(options: SweepOptions) -> dict[str, Batches]:
    """Name -> what makes the groups."""
    if options.dry_run:
        tiny = Shape(prompt=40, response=4, responses=3, groups=2)
        return {
            "responses": lambda: make_groups(tiny, 1000),
            "trajectories": lambda: made_up_trajectories("whole"),
            "trajectories per call": lambda: made_up_trajectories("per call"),
        }
    num_tasks = 8 if options.quick else None
    return {
        "responses": lambda: make_groups(RESPONSES, 50_000),
        "trajectories": lambda: read_trajectories(options, "whole", num_tasks),
        "trajectories per call": lambda: read_trajectories(options, "per call", num_tasks),
    }


def plan_mode(mode: str, groups: Sequence[Group]) -> None:
    """Plan a micro-batch like a data worker in schedule ``full``."""
    collate(groups, modes=(mode,))


def plan_chunks(num_micro_batches: int, groups: Sequence[Group]) -> None:
    """Plan a step like a data worker in schedule ``bounded``."""
    size = -(-len(groups) // num_micro_batches)
    parts = [groups[start : start + size] for start in range(0, len(groups), size)]
    batches = [collate(part) for part in parts]
    join_batches(batches, max_tokens_per_chunk=DEFAULT_MAX_TOKENS_PER_CHUNK, counts_occurrences=False)


PLANS: Mapping[str, Callable[[Sequence[Group]], None]] = {
    "two_pass": lambda groups: plan_mode("two_pass", groups),
    "one_pass": lambda groups: plan_mode("one_pass", groups),
    "bounded": lambda groups: plan_chunks(1, groups),
    f"bounded, {MICRO_BATCHES} micro-batches": lambda groups: plan_chunks(MICRO_BATCHES, groups),
}


def measure(groups: Sequence[Group], mode: str, clock: str) -> dict[str, Any]:
    """Times of several rounds of planning, in total and by stage."""
    unique, total = collate(_anew(groups)).num_unique_tokens, sum(len(part) for group in groups for part in group.parts)
    rounds: list[dict[str, float]] = []
    started = time.monotonic()
    while len(rounds) < NUM_ROUNDS and (not rounds or time.monotonic() - started < BUDGET_S):
        fresh, spent = _anew(groups), dict.fromkeys(STAGES, 0.0)
        with _stages_timed(spent, CLOCKS[clock]):
            begun = CLOCKS[clock]()
            PLANS[mode](fresh)
            seconds = CLOCKS[clock]() - begun
        rounds.append({"total": seconds, **spent, "tensors": seconds - sum(spent.values())})
    middle = sorted(rounds, key=lambda row: row["total"])[(len(rounds) - 1) // 2]
    return {
        "mode": mode,
        "unique_tokens": unique,
        "total_tokens": total,
        "num_sequences": sum(map(len, groups)),
        "seconds": median(row["total"] for row in rounds),
        "rounds_s": [row["total"] for row in rounds],
        "us_per_unique_token": {name: 1e6 * value / unique for name, value in middle.items()},
    }


@contextmanager
def _stages_timed(spent: dict[str, float], now: Callable[[], float]) -> Iterator[None]:
    """While open, calls of the functions of `STAGES` add their seconds to `spent`."""

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = now()
            try:
                return function(*args, **kwargs)
            finally:
                spent[stage] += now() - begun

        return call

    with ExitStack() as stack:
        for stage, places in STAGES.items():
            for place in places:
                module, name = place.split(":")
                function = getattr(importlib.import_module(module), name)
                stack.enter_context(patch(f"{module}.{name}", timed(stage, function)))
        yield


def _anew(groups: Sequence[Group]) -> list[Group]:
    return [
        Group([TokenSequence(s.ids, s.flags) for s in group.sequences], scores=group.scores, id=group.id)
        for group in groups
    ]


def print_profile(groups: Sequence[Group], mode: str, num_lines: int = 25) -> None:
    """Print the functions of one plan with the most self time."""
    fresh, profile = _anew(groups), cProfile.Profile(time.process_time)
    profile.runcall(PLANS[mode], fresh)
    pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(num_lines)


def show(name: str, row: Mapping[str, Any]) -> str:
    """One line of the table."""
    us = row["us_per_unique_token"]
    stages = ", ".join(f"{stage} {value:.3f}" for stage, value in us.items() if stage != "total")
    verdict = "met" if us["total"] <= BAR_US else "missed"
    return (
        f"{name:22} {row['mode']:25} {us['total']:7.3f} us per unique token ({stages}); bar {BAR_US} {verdict}; "
        f"{row['seconds']:.2f} s for {row['unique_tokens']} of {row['total_tokens']} tokens"
    )


def main() -> int:
    args = parse_arguments()
    options = SweepOptions(
        device=torch.device("cpu"), quick=args.quick, dry_run=args.dry_run, shared=args.shared, clock=args.clock
    )
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "title": "planning: prefix tree, layout and tensors",
        "provenance": asdict(Provenance.collect(options.device)),
        "bar_us_per_unique_token": BAR_US,
        "settings": {
            "responses": RESPONSES.name,
            "max_tokens_per_chunk": DEFAULT_MAX_TOKENS_PER_CHUNK,
            "clock": args.clock,
            "quick": args.quick,
        },
        "rows": [],
        "skipped": {},
    }
    for name, build in batches(options).items():
        if args.batch and name not in args.batch:
            continue
        try:
            groups = build()
        except MissingDataError as error:
            result["skipped"][name] = str(error)
            print(f"skipped {name}: {error}")
            continue
        for mode in args.mode or PLANS:
            row = {"batch": name} | measure(groups, mode, args.clock)
            result["rows"].append(row)
            print(show(name, row), flush=True)
            if args.profile:
                print_profile(groups, mode)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "planning.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ("responses", "trajectories", "trajectories per call")
    parser.add_argument("--batch", action="append", choices=known, help="default: all")
    parser.add_argument("--mode", action="append", choices=list(PLANS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="trajectories of 8 tasks in place of 50")
    parser.add_argument("--dry-run", action="store_true", help="tiny and made up, seconds")
    parser.add_argument("--profile", action="store_true", help="print the functions that take most time, too")
    parser.add_argument("--clock", choices=list(CLOCKS), default="process", help="wall, if nobody else works here")
    parser.add_argument("--shared", type=Path, help="folder with data/ and tokenizers/")
    parser.add_argument("--output", type=Path, help="default: $OUT, or benchmarks/results; outputs/bench for a part")
    args = parser.parse_args()
    part = args.quick or args.dry_run or args.batch or args.mode
    args.output = args.output or results_folder(keep=not part)
    return args


if __name__ == "__main__":
    sys.exit(main())
