"""Forward and backward of one micro-batch of real data in every mode, beside the FLOP-exact ideal.

The modes are interleaved in one process and ratios are taken against `packed`, so that other load on the machine
falls on all of them. Prints a table and writes JSON:

    python benchmarks/modes.py --data hh=pairs.jsonl --tokenizer gpt_neox_20b --groups 16
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import kvpref
from kvpref.data import PreferenceDataset, load_preferences
from kvpref.plans import ModePlan

HERE = Path(__file__).resolve().parent
MODES = ("two_pass", "one_pass", "packed", "padded")


@dataclass(frozen=True, kw_only=True)
class Work:
    """FLOPs of one forward and backward. Backward costs twice the forward; the head's tiles are computed once more."""

    linear: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.head


def count_work(model: Any, plan: ModePlan) -> Work:
    """Exact FLOPs: linear layers on the tokens that run, attention on the pairs attended to, head on scored tokens."""
    config = model.config
    weights = sum(p.numel() for name, p in model.base_model.layers.named_parameters() if p.ndim == 2)
    head_dim = config.hidden_size // config.num_attention_heads
    if plan.mode == "padded":
        rows, width = plan.passes[0].input_ids.shape
        pairs = rows * width * width  # the masked half is computed too
    else:
        blocks = [
            block for item in plan.passes for level in item.levels for block in (level.self_block, *level.cross_blocks)
        ]
        pairs = sum(
            (q1 - q0) * (q1 - q0 + 1) // 2 if block.causal else (q1 - q0) * (k1 - k0)
            for block in blocks
            for q0, q1, k0, k1 in block.pairs
        )
    return Work(
        linear=3 * 2 * weights * plan.num_forward_tokens,
        # Two products forward, five backward (scores again, dV, dP, dQ, dK).
        attention=7 * 2 * pairs * head_dim * config.num_attention_heads * config.num_hidden_layers,
        head=4 * 2 * config.vocab_size * config.hidden_size * len(plan.targets),
    )


def measure(model: Any, batch: kvpref.Batch, repeats: int) -> dict[str, list[float]]:
    """Seconds of forward and backward per mode, interleaved; one warm-up each."""
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for repeat in range(repeats + 1):
        for mode in MODES:
            model.zero_grad()
            batch.plan(mode)
            started = time.perf_counter()
            kvpref.response_logps(model, batch, mode=mode).token_logps.sum().backward()
            if repeat:
                seconds[mode].append(time.perf_counter() - started)
    return seconds


def sample(groups: PreferenceDataset, num_groups: int) -> kvpref.Batch:
    """Groups spread evenly over the data set, sorted by length as the trainer's windows are."""
    order = sorted(range(len(groups)), key=lambda index: groups.lengths[index].max_sequence_tokens)
    middle = len(order) // 2
    chosen = order[middle - num_groups // 2 : middle - num_groups // 2 + num_groups]
    return kvpref.collate([groups[index] for index in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, help="NAME=FILE, once per data set")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "modes.json")
    args = parser.parse_args()

    settings = json.loads((HERE / "llama_384.json").read_text())
    torch.manual_seed(0)
    model = kvpref.attach(AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)))
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    table = Table(title="forward + backward, ratios against packed")
    for column in ("data", "mode", "tokens", "seconds (median)", "spread", "speedup", "ideal", "efficiency"):
        table.add_column(column)
    results = []
    for name, _, path in (item.partition("=") for item in args.data):
        batch = sample(load_preferences(path, tokenizer), args.groups)
        seconds = measure(model, batch, args.repeats)
        work = {mode: count_work(model, batch.plan(mode)) for mode in MODES}
        for mode in MODES:
            # The ratio of neighbours in time, so that slow phases of the machine cancel.
            speedup = statistics.median(b / s for b, s in zip(seconds["packed"], seconds[mode], strict=True))
            ideal = work["packed"].total / work[mode].total
            median = statistics.median(seconds[mode])
            row = {
                "data": name,
                "mode": mode,
                "num_groups": batch.num_groups,
                "num_sequences": batch.num_sequences,
                "forward_tokens": batch.plan(mode).num_forward_tokens,
                "seconds": seconds[mode],
                "speedup_over_packed": speedup,
                "ideal": ideal,
                "efficiency": speedup / ideal,
                "flops": work[mode].__dict__,
            }
            results.append(row)
            spread = (max(seconds[mode]) - min(seconds[mode])) / median
            table.add_row(
                *(name, mode, str(row["forward_tokens"]), f"{median:.2f}", f"{spread:.0%}"),
                *(f"{speedup:.2f}x", f"{ideal:.2f}x", f"{speedup / ideal:.2f}"),
            )
    Console().print(table)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "kvpref": kvpref.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "model": settings,
        "results": results,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
