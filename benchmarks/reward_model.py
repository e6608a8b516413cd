"""Train a small reward model from random weights on GSM8K solutions and rank held-out ones, through the command line.

Every fifth problem is held out. Several seeds, because single runs of so small a model on some hundred problems differ;
all are reported. The interval is a bootstrap over held-out problems, whose pairs are not independent:

    python benchmarks/reward_model.py --data gsm8k_groups.jsonl --tokenizer gpt_neox_20b     # some minutes on a CPU

Writes benchmarks/results/reward_model.json.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from places import results_folder

from kvpref.data.reward_quality import RewardQuality, measure_rewards
from kvpref.profiling.provenance import Provenance

HELD_OUT_EVERY = 5
SEEDS = (1, 2, 3, 4, 5)
NUM_DRAWS = 2000
CONFIG = {
    "model_type": "llama",
    "vocab_size": 50432,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SETTINGS = [
    *("--loss", "bradley_terry", "--epochs", "2", "--batch-size", "16", "--learning-rate", "1e-3"),
    *("--set", "lr_scheduler_type=cosine", "--set", "warmup_steps=10", "--set", "weight_decay=0.0"),
]

Scored = list[tuple[list[float], list[float]]]
"""Per held-out problem the rewards and the scores of its responses."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--work", type=Path, default=Path("outputs/reward_model"), help="models and splits go here")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop each run early, to try the script")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    split(args.data, args.work)
    runs = [run(args, seed) for seed in SEEDS]
    result = {
        "settings": SETTINGS,
        "config": CONFIG,
        "held_out_every": HELD_OUT_EVERY,
        "runs": [{"seed": seed, **summary(scored)} for seed, scored in zip(SEEDS, runs, strict=True)],
        "mean_over_seeds": mean_over_seeds(runs),
        "provenance": asdict(Provenance.collect(torch.device("cpu"))),
    }
    path = results_folder(keep=args.max_steps < 0) / "reward_model.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["mean_over_seeds"]))


def split(data: Path, work: Path) -> None:
    """Write train.jsonl and held_out.jsonl, and the model's configuration."""
    rows = data.read_text().splitlines(keepends=True)
    held_out = range(0, len(rows), HELD_OUT_EVERY)
    (work / "held_out.jsonl").write_text("".join(rows[index] for index in held_out))
    (work / "train.jsonl").write_text("".join(row for index, row in enumerate(rows) if index not in held_out))
    (work / "config.json").write_text(json.dumps(CONFIG))


def run(args: argparse.Namespace, seed: int) -> Scored:
    """Train and score with one seed; a finished run is not repeated."""
    output, rewards = args.work / f"seed-{seed}", args.work / f"rewards-{seed}.jsonl"
    kvpref = [sys.executable, "-m", "kvpref"]
    if not (output / "model.safetensors").exists():
        start = ["--model-config", str(args.work / "config.json"), str(args.work / "train.jsonl")]
        where = ["--tokenizer", args.tokenizer, "--output", str(output), "--seed", str(seed), "--resume"]
        subprocess.run([*kvpref, "train", *start, *where, *SETTINGS, "--max-steps", str(args.max_steps)], check=True)
    held_out = [str(output), str(args.work / "held_out.jsonl"), "--output", str(rewards)]
    subprocess.run([*kvpref, "score", "--reward-model", *held_out], check=True)
    problems: dict[int, tuple[list[float], list[float]]] = {}
    for row in map(json.loads, rewards.read_text().splitlines()):
        of_problem = problems.setdefault(row["group"], ([], []))
        of_problem[0].append(row["reward"])
        of_problem[1].append(row["score"])
    return list(problems.values())


def summary(scored: Scored) -> dict[str, Any]:
    """Pair accuracy, the score of the best by reward, and what choosing blindly and perfectly would give."""
    return asdict(measure_rewards(scored)) | {
        "pair_accuracy_95": interval([scored], lambda quality: quality.pair_accuracy),
        "best_of_n_gain_95": interval([scored], gain),
    }


def mean_over_seeds(runs: Sequence[Scored]) -> dict[str, Any]:
    """Means of all seeds, each judged on the same held-out problems, which are drawn together for the intervals."""
    qualities = [measure_rewards(scored) for scored in runs]
    return {
        "pair_accuracy": sum(quality.pair_accuracy or 0.0 for quality in qualities) / len(runs),
        "pair_accuracy_95": interval(runs, lambda quality: quality.pair_accuracy),
        "best_of_n_score": sum(quality.best_of_n_score or 0.0 for quality in qualities) / len(runs),
        "mean_score": qualities[0].mean_score,
        "best_of_n_gain_95": interval(runs, gain),
    }


def gain(quality: RewardQuality) -> float:
    """What choosing by reward adds to the mean score."""
    assert quality.best_of_n_score is not None
    assert quality.mean_score is not None
    return quality.best_of_n_score - quality.mean_score


def interval(runs: Sequence[Scored], value: Any) -> tuple[float, float]:
    """95% bootstrap interval, over held-out problems, of the mean over seeds of a value."""
    generator = random.Random(0)
    count = len(runs[0])
    means = []
    for _ in range(NUM_DRAWS):
        drawn = [generator.randrange(count) for _ in range(count)]
        means.append(sum(value(measure_rewards([run[index] for index in drawn])) for run in runs) / len(runs))
    means.sort()
    return means[int(0.025 * NUM_DRAWS)], means[int(0.975 * NUM_DRAWS)]


if __name__ == "__main__":
    main()
