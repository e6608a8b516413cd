"""kvpref beside its peers in one process: same model, token ids, batches, optimizer and precomputed references.

A peer is timed only if its log-probs, loss and gradient on the first batch equal kvpref's; then the two take turns,
step by step. Ratios are reported beside the ratio of FLOPs, counted in closed form. Prints tables, writes JSON and PNG:

    OMP_NUM_THREADS=1 python benchmarks/peers.py --peer trl --data hh_harmless_pairs.jsonl --tokenizer gpt_neox_20b
    python benchmarks/peers.py --dry-run    # tiny shapes, some seconds, no data needed
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import PEERS
from peers.comparison import Comparison, compare
from peers.interface import Peer
from peers.made_up import made_up_task
from peers.report import draw, print_tables, to_json
from peers.task import Task, load_task
from peers.trl_dpo import TRL_SETTINGS
from rich.console import Console

HERE = Path(__file__).resolve().parent


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    shared = Path(os.environ.get("KVPREF_SHARED", HERE.parents[1] / "shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("all", *PEERS), default="all")
    parser.add_argument("--trl-setting", choices=(*TRL_SETTINGS, "both"), default="both")
    parser.add_argument("--data", type=Path, default=shared / "data" / "hh_harmless_pairs.jsonl")
    parser.add_argument("--tokenizer", type=Path, default=shared / "tokenizers" / "gpt_neox_20b")
    parser.add_argument("--model", type=Path, default=HERE / "llama_384.json", help="settings of a random model")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps")
    parser.add_argument("--pairs", type=int, default=8, help="pairs per optimizer step")
    parser.add_argument("--rounds", type=int, default=2, help="trainings of each, from the same weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="the JSON; default: results/peers_PEER.json, none in a dry run")
    parser.add_argument("--json", action="store_true", help="the JSON in one line at the end of stdout")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, 2 steps of 2 made-up pairs")
    args = parser.parse_args(arguments)
    if args.dry_run:
        args.steps, args.pairs = 2, 2
        return args
    for option in ("data", "tokenizer", "model"):
        if not getattr(args, option).exists():
            parser.error(f"--{option}: no file or folder {getattr(args, option)}; give one, or set KVPREF_SHARED")
    args.output = args.output or HERE / "results" / f"peers_{args.peer}.json"
    return args


def selected(peer: str, trl_setting: str) -> list[Peer]:
    """The peers that the command line names."""
    names = PEERS if peer == "all" else (peer,)
    return [
        item for name in names for item in PEERS[name] if trl_setting == "both" or item.setting in (None, trl_setting)
    ]


def run(args: argparse.Namespace, task: Task) -> tuple[list[Comparison], dict[str, Any]]:
    """Compare every selected peer on the task; results are written after each, since a run takes long.

    Returns:
        The comparisons, and the same as JSON.
    """
    comparisons: list[Comparison] = []
    result: dict[str, Any] = {}
    for peer in selected(args.peer, args.trl_setting):
        with_batches = task.in_batches(peer.batching, num_steps=args.steps, pairs_per_step=args.pairs)
        comparisons.append(compare(peer, with_batches, num_rounds=args.rounds, progress=_to_stderr))
        result = to_json(comparisons, task, _settings(args))
        if args.output is not None:
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            draw(comparisons, args.output.with_suffix(".png"))
    return comparisons, result


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    data = "made up" if args.dry_run else args.data.name
    return {"data": data, "steps": args.steps, "pairs_per_step": args.pairs, "rounds": args.rounds}


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="kvpref-peers-") as folder:
        work_dir = Path(folder)
        if args.dry_run:
            task = made_up_task(work_dir)
        else:
            task = load_task(args.data, args.tokenizer, args.model, work_dir=work_dir, device=args.device)
        comparisons, result = run(args, task)
    print_tables(comparisons, Console())
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
