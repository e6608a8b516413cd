"""What a user of TRL gains: TRL's trainer, the same inside `kvpref.shared_prefix`, its subclass in
`kvpref.integrations.trl`, and `kvpref.PreferenceTrainer`, on the same data from the same weights.

DPO on hh_harmless_pairs; GRPO's update (the samples are given, nothing is generated) and a reward model on
gsm8k_groups. The four take turns in one process, one optimizer step each per round, every round on other data; a step
is all that the trainer does for it: batch, forward, backward, clipping, AdamW. The first round is not counted. All of
them compute the log-probs that stay fixed (DPO's reference, GRPO's old policy) before it, so they are in no time. TRL
runs without gradient checkpointing, on batches of similar lengths: the fastest that it has here. Losses and gradient
norms of every step must agree. Writes results/trl_users.json and prints the table of docs/benchmarks.md:

    OMP_NUM_THREADS=1 python benchmarks/trl_users.py              # some minutes
    OMP_NUM_THREADS=1 python benchmarks/trl_users.py --dry-run    # tiny and made up, some seconds
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from options import SweepOptions
from places import HERE, results_folder
from trl_users import WORKLOADS
from trl_users.interface import LEARNING_RATE, Source, Workload
from trl_users.measure import measure
from trl_users_table import table

from kvpref.profiling.provenance import Provenance
from kvpref.profiling.timing import CLOCKS, TimingOptions

MODEL = HERE / "llama_384.json"
TOKENIZER = "gpt_neox_20b"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="one of them; may be given again")
    parser.add_argument("--rounds", type=int, default=5, help="optimizer steps that count")
    parser.add_argument("--shared", type=Path, help="folder with data/ and tokenizers/; default: KVPREF_SHARED")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="process: for a machine that others use too")
    parser.add_argument("--dry-run", action="store_true", help="tiny and made up: shows that everything runs")
    args = parser.parse_args(arguments)
    if args.dry_run:
        args.rounds = 2
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    options = SweepOptions(device=torch.device("cpu"), dry_run=args.dry_run, shared=args.shared, clock=args.clock)
    names = args.workload or list(WORKLOADS)
    folder = results_folder(keep=not args.dry_run and set(names) == set(WORKLOADS))
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "provenance": asdict(Provenance.collect(options.device)) | {"trl_version": version("trl")},
        "settings": {
            "rounds": args.rounds,
            "clock": args.clock,
            "learning_rate": LEARNING_RATE,
            "model": "made up" if args.dry_run else json.loads(MODEL.read_text()),
        },
        "workloads": [],
    }
    for name in names:
        print(f"{name}: {args.rounds + 1} steps of each", file=sys.stderr, flush=True)
        started = time.perf_counter()
        found["workloads"].append(run(WORKLOADS[name], options, args.rounds))
        print(f"{name}: {time.perf_counter() - started:.0f} s in all", file=sys.stderr, flush=True)
        (folder / "trl_users.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(table(folder)))


def run(workload: Workload, options: SweepOptions, num_rounds: int) -> dict[str, Any]:
    """Load a workload's data and measure it.

    Raises:
        MissingDataError: If its files are not here.
        RunError: If the ways do not compute the same.
    """
    timing = TimingOptions(num_rounds=num_rounds, num_warmup=1, clock=options.clock)
    with tempfile.TemporaryDirectory(prefix="kvpref-trl-users-") as folder:
        if options.dry_run:
            task = workload.made_up(Path(folder))
        else:
            task = workload.load(source_of(workload, options), Path(folder))
        task = workload.take_steps(task, num_rounds + timing.num_warmup)
        return measure(workload, task, timing)


def source_of(workload: Workload, options: SweepOptions) -> Source:
    """The files of a real run.

    Raises:
        MissingDataError: If one is not here.
    """
    return Source(
        data=options.shared_file(f"data/{workload.data}.jsonl"),
        tokenizer=options.shared_file(f"tokenizers/{TOKENIZER}"),
        model=MODEL,
    )


if __name__ == "__main__":
    main()
