"""Train a small Llama from random weights on real preference pairs: one epoch of sft, then dpo, in two modes.

The two runs of each loss must give the same loss curve. Writes the metrics of every step and a plot to
benchmarks/results/. Needs the Anthropic HH harmless pairs as JSONL and a GPT-NeoX tokenizer:

    python benchmarks/hh_harmless.py --train pairs.jsonl --eval pairs_eval.jsonl --tokenizer gpt_neox_20b
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import kvpref

HERE = Path(__file__).resolve().parent
MODES = ("two_pass", "padded")
SETTINGS: dict[str, list[str]] = {
    "sft": ["--learning-rate", "1e-3", "--set", "lr_scheduler_type=cosine", "--set", "warmup_steps=10"],
    "dpo": ["--learning-rate", "1e-4", "--set", "lr_scheduler_type=cosine", "--set", "warmup_steps=10"],
}
COMMON = ["--epochs", "1", "--batch-size", "16", "--max-tokens", "2048", "--logging-steps", "1", "--seed", "7"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--work", type=Path, default=Path("outputs/hh_harmless"), help="checkpoints go here")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop each run early, to try the script")
    args = parser.parse_args()
    # Both dpo runs start from the same weights: those of the two_pass sft run.
    runs = {
        (loss, mode): run(args, loss, mode, start=args.work / "sft-two_pass" if loss == "dpo" else None)
        for mode in MODES
        for loss in ("sft", "dpo")
    }
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "kvpref": kvpref.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "settings": {"common": COMMON, **SETTINGS, "model": json.loads((HERE / "llama_384.json").read_text())},
        "largest_loss_difference": {
            loss: largest_difference(runs[loss, MODES[0]]["steps"], runs[loss, MODES[1]]["steps"]) for loss in SETTINGS
        },
        "runs": {f"{loss}-{mode}": value for (loss, mode), value in runs.items()},
    }
    (HERE / "results" / "hh_harmless.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(runs, HERE / "results" / "hh_harmless.png")
    print(json.dumps(result["largest_loss_difference"]))


def run(args: argparse.Namespace, loss: str, mode: str, start: Path | None) -> dict[str, Any]:
    """One training run through the command line; its metrics per step and at the end."""
    output = args.work / f"{loss}-{mode}"
    model = [str(start), args.train] if start else ["--model-config", str(HERE / "llama_384.json"), args.train]
    command = [sys.executable, "-m", "kvpref", "train", *model, "--tokenizer", args.tokenizer, "--loss", loss]
    command += ["--mode", mode, "--eval-data", args.eval, "--output", str(output), *COMMON, *SETTINGS[loss]]
    command += ["--max-steps", str(args.max_steps), "--resume"]
    if not (output / "model.safetensors").exists():  # a finished run is not repeated
        subprocess.run(command, check=True)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "training": next(line for line in lines if "train_runtime" in line),
        "evaluation": next(line for line in reversed(lines) if "eval_loss" in line),
        "steps": [line for line in lines if "loss" in line],
    }


def largest_difference(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> float:
    """Largest absolute difference of the losses of two runs at the same step."""
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(first, second, strict=True))


def plot(runs: dict[tuple[str, str], dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("sft", "loss", "sft: loss (nats per token)"),
        ("dpo", "loss", "dpo: loss (nats)"),
        ("dpo", "rewards/margins", "dpo: reward margin"),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 3.8), constrained_layout=True)
    for axis, (loss, name, title) in zip(axes, panels, strict=True):
        for mode, style in zip(
            MODES, ({"linewidth": 4, "alpha": 0.4}, {"linewidth": 1, "color": "black"}), strict=True
        ):
            steps = runs[loss, mode]["steps"]
            axis.plot([line["step"] for line in steps], [line[name] for line in steps], label=mode, **style)
        axis.set(title=title, xlabel="optimizer step (16 pairs)")
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
