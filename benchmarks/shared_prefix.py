"""What `kvpref.shared_prefix` costs if nothing is shared, and gains if something is, on the CPU.

A Llama of 4 layers, 256 wide, on 16 rows of 256 tokens (and 4 of 64), with and without the switch in turns in one
process. Ratios are time with it over time without it:

    OMP_NUM_THREADS=1 python benchmarks/shared_prefix.py                # six minutes; writes results/shared_prefix.json
    OMP_NUM_THREADS=1 python benchmarks/shared_prefix.py --only bars    # little shared: where sharing begins to gain
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import torch
from places import results_folder
from transformers import LlamaConfig, LlamaForCausalLM

import kvpref
from kvpref.integrations.shared_prefix import SharedPrefixStats
from kvpref.profiling.provenance import Provenance
from kvpref.profiling.timing import TimingOptions, time_rounds

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A padded batch of rows of equal length."""

    num_rows: int
    """Rows."""

    num_tokens: int
    """Tokens of each."""

    num_groups: int
    """Groups of rows that begin alike."""

    num_shared: int
    """Tokens of the shared beginnings."""

    training: bool
    """Forward and backward, or the forward without gradients."""

    num_rounds: int = 15
    """How often it is timed."""

    is_forced: bool = False
    """Whether it is served however little it saves, to see where it begins to gain."""

    @property
    def share_saved(self) -> float:
        """Share of the tokens that need not run."""
        return self.num_shared * (self.num_rows - self.num_groups) / (self.num_rows * self.num_tokens)

    def batch(self) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, SIZES["vocab_size"], (self.num_rows, self.num_tokens), generator=generator)
        size = self.num_rows // self.num_groups
        for first in range(0, self.num_rows, size):
            ids[first : first + size, : self.num_shared] = ids[first, : self.num_shared]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


ROWS = [
    Case(num_rows=rows, num_tokens=tokens, num_groups=groups, num_shared=shared, training=training, num_rounds=rounds)
    for training in (False, True)
    for rows, tokens, groups, shared, rounds in (
        (16, 256, 16, 0, 25),
        (4, 64, 4, 0, 80),
        (16, 256, 8, 128, 9),
        (16, 256, 2, 192, 9),
    )
]
BARS = [
    Case(
        num_rows=rows,
        num_tokens=tokens,
        num_groups=groups,
        num_shared=shared,
        training=training,
        num_rounds=rounds,
        is_forced=True,
    )
    for training in (False, True)
    for rows, tokens, groups, shared, rounds in (
        (16, 256, 8, 26, 9),
        (16, 256, 8, 51, 9),
        (16, 256, 8, 77, 9),
        (4, 64, 1, 19, 60),
        (4, 64, 1, 43, 60),
    )
]
PARTS = {"rows": ROWS, "bars": BARS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="one round of each: shows that everything runs")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; the other's results stay")
    parser.add_argument("--clock", default="wall", help="as for sweeps.py")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=512))
    path = results_folder(keep=not args.dry_run) / "shared_prefix.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(path.read_text()) if path.exists() else {}
    for part in args.only or PARTS:
        result[part] = []
        for case in PARTS[part]:
            rounds = 1 if args.dry_run else case.num_rounds
            result[part].append(measure(model, case, TimingOptions(num_rounds=rounds, clock=args.clock)))
            print(json.dumps(result[part][-1]))
    result |= {"model": SIZES, "provenance": asdict(Provenance.collect(CPU))}
    path.write_text(json.dumps(result, indent=2) + "\n")


def measure(model: LlamaForCausalLM, case: Case, options: TimingOptions) -> dict[str, Any]:
    """Median and quartiles of the ratio over the rounds, and what the switch counted."""
    batch = case.batch()
    bars = {"min_saved": 0.0, "min_saved_tokens": 1, "min_shared_tokens": 1} if case.is_forced else {}
    served: list[SharedPrefixStats] = []

    def with_switch() -> None:
        with kvpref.shared_prefix(model, **bars) as switch:
            run(model, batch, training=case.training)
        served.append(switch.stats)

    cases: dict[str, Callable[[], object]] = {
        "with": with_switch,
        "without": lambda: run(model, batch, training=case.training),
    }
    times = time_rounds(cases, CPU, options)
    ratios = [own / other for own, other in zip(times["with"], times["without"], strict=True)]
    return {
        **asdict(case),
        "share_saved": case.share_saved,
        "is_served": all(stats.num_served for stats in served),
        "ratio": median(ratios),
        "quartiles": quantiles(ratios, n=4) if len(ratios) > 1 else None,
        "without_ms": median(times["without"]),
    }


def run(model: LlamaForCausalLM, batch: dict[str, torch.Tensor], *, training: bool) -> None:
    """One call whose head sees only the last token, since the head is always the model's own."""
    with torch.set_grad_enabled(training):
        total = model(**batch, logits_to_keep=1, use_cache=False).logits.sum()
    if training:
        total.backward()
        model.zero_grad()


if __name__ == "__main__":
    main()
