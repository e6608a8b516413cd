"""What the bounded schedule saves, on the CPU: memory against the number of responses, sharing across the micro-batches
of a step, GRPO with 16 and 100 responses, and the longest prompt.

    python benchmarks/memory.py                        # all of it, some minutes; writes results/memory.json
    python benchmarks/memory.py --only sharing --dry-run
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from llama_models import DRY_RUN, SMALL, LlamaSizes, build_model
from options import SweepOptions
from places import results_folder
from real_data import RealFile, read_groups
from rich.console import Console
from train_step import best_vs_rest

from kvpref import Batch, Group, ResponseLogps, collate, forward_backward
from kvpref import Sequence as TokenSequence
from kvpref.engine.options import EngineOptions
from kvpref.engine.schedules import forward_backward_step, score
from kvpref.losses import LossFunction, PreferenceLoss, make_loss
from kvpref.plan.step import join_batches
from kvpref.profiling.memory.peak import peak_bytes
from kvpref.profiling.provenance import Provenance
from kvpref.profiling.timing import time_rounds

FULL = EngineOptions()
GAME24 = RealFile(file="game24_groups", sizes=SMALL, max_tokens=400_000, dry_responses=8)
LONG_PROMPT = LlamaSizes(
    hidden_size=128, intermediate_size=384, num_layers=2, num_heads=2, num_kv_heads=1, vocab_size=1024
)
"""Small enough for a CPU to attend over a prompt of 32k tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryStep:
    """Forward, backward and AdamW over some micro-batches."""

    model: torch.nn.Module
    """Attached, in training mode."""

    batches: Sequence[Batch]
    """The micro-batches."""

    options: EngineOptions
    """How the micro-batches run."""

    optimizer: torch.optim.Optimizer
    """Steps at the end."""

    shares: bool = False
    """Encode what micro-batches share once per step (schedule ``bounded``)."""

    loss: PreferenceLoss | LossFunction = best_vs_rest
    """The loss to minimise."""

    references: Sequence[ResponseLogps | None] = ()
    """Reference log-probs per micro-batch, where the loss reads them."""

    def run(self) -> float:
        """One step; its loss."""
        self.model.zero_grad(set_to_none=True)
        references = self.references or [None] * len(self.batches)
        if self.shares:
            losses = self._run_joined(references)
        else:
            losses = [self._run_one(*pair) for pair in zip(self.batches, references, strict=True)]
        self.optimizer.step()
        return sum(losses) / len(losses)

    def resident_bytes(self) -> int:
        """Bytes of weights and optimizer state."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers(), *states))

    def peak(self) -> dict[str, int]:
        """Peak bytes of a step, in total and above weights, gradients and optimizer state."""
        self.run()  # makes the optimizer's state
        resident = self.resident_bytes()
        total = peak_bytes(self.run, torch.device("cpu"), resident)
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        return {"peak_bytes": total, "step_bytes": total - resident - weights}

    def _run_one(self, batch: Batch, reference: ResponseLogps | None) -> float:
        options = {"reference": reference, "backward": self._scaled, **asdict(self.options)}
        return forward_backward(self.model, batch, self.loss, **options).loss.item()

    def _run_joined(self, references: Sequence[ResponseLogps | None]) -> list[float]:
        step = join_batches(self.batches, max_tokens_per_chunk=self.options.chunk_tokens)
        outputs = forward_backward_step(
            self.model,
            step,
            self.loss,
            self.options,
            references=references,
            backward=lambda loss, _: self._scaled(loss),
        )
        return [output.loss.item() for output in outputs]

    def _scaled(self, loss: torch.Tensor) -> None:
        (loss / len(self.batches)).backward()


def make_step(sizes: LlamaSizes, groups: Sequence[Sequence[Group]], engine: EngineOptions, **kwargs: Any) -> MemoryStep:
    """A step over micro-batches of these groups, with a new model."""
    model = build_model(sizes, SweepOptions(device=torch.device("cpu")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    modes = () if engine.runs_chunks else (engine.mode,)
    batches = [collate(part, modes=modes) for part in groups]
    return MemoryStep(model=model, batches=batches, options=engine, optimizer=optimizer, **kwargs)


def responses(options: SweepOptions) -> dict[str, Any]:
    """game24: the peak with all 100 responses of a group beside that with 10, and the losses beside those of `full`."""
    chunk = 64 if options.dry_run else 512
    bounded = EngineOptions(schedule="bounded", max_tokens_per_chunk=chunk)
    source, sizes, counts = _game24(options)
    found: dict[str, Any] = {"max_tokens_per_chunk": chunk, "peaks": []}
    for num_responses in counts:
        groups = [first_responses(group, num_responses) for group in source[:1]]
        for engine in (bounded, FULL):
            step = make_step(sizes, [groups], engine)
            batch = step.batches[0]
            row = {"schedule": engine.schedule, "num_responses": num_responses, "tokens": batch.num_unique_tokens}
            found["peaks"].append(row | step.peak())
    by_count = {row["num_responses"]: row for row in found["peaks"] if row["schedule"] == "bounded"}
    few, many = (by_count[count] for count in counts)
    found["peak_ratio"] = many["peak_bytes"] / few["peak_bytes"]
    found["step_ratio"] = many["step_bytes"] / few["step_bytes"]
    losses = {}
    for engine in (bounded, FULL):
        step = make_step(sizes, [[group] for group in source[:2]], engine, shares=engine is bounded)
        losses[engine.schedule] = [step.run() for _ in range(3)]
    found["losses"] = losses
    pairs = zip(losses["bounded"], losses["full"], strict=True)
    found["largest_loss_difference"] = max(abs(own - other) for own, other in pairs)
    return found


def sharing(options: SweepOptions) -> dict[str, Any]:
    """game24: one few-shot prefix in every row, encoded once per micro-batch or once per step."""
    chunk = 64 if options.dry_run else 1024
    bounded = EngineOptions(schedule="bounded", max_tokens_per_chunk=chunk)
    source, sizes, counts = _game24(options)
    groups = [[first_responses(group, counts[0])] for group in source[:8]]
    steps = {
        "full": make_step(sizes, groups, FULL),
        "bounded, each micro-batch": make_step(sizes, groups, bounded),
        "bounded, once per step": make_step(sizes, groups, bounded, shares=True),
    }
    first_losses = {name: step.run() for name, step in steps.items()}
    times = time_rounds({name: step.run for name, step in steps.items()}, torch.device("cpu"), options.timing)
    unique = sum(batch.num_unique_tokens for batch in steps["full"].batches)
    joined = join_batches(steps["full"].batches, max_tokens_per_chunk=chunk)
    tokens = dict.fromkeys(steps, unique) | {"bounded, once per step": sum(joined.chunks.num_tokens_by_micro_batch())}
    rows = [
        {"name": name, "tokens": tokens[name], "loss": first_losses[name], "median_ms": median(times[name])}
        | steps[name].peak()
        for name in steps
    ]
    return {"num_responses": counts[0], "num_micro_batches": len(groups), "max_tokens_per_chunk": chunk, "rows": rows}


def long_prompt(options: SweepOptions) -> dict[str, Any]:
    """One prompt of 32k tokens and four responses, in chunks of 1024 tokens."""
    num_tokens, chunk = (256, 64) if options.dry_run else (32768, 1024)
    generator = torch.Generator().manual_seed(0)
    vocab = LONG_PROMPT.vocab_size
    prompt = torch.randint(vocab, (num_tokens,), generator=generator).tolist()
    answers = torch.randint(vocab, (4, 128), generator=generator).tolist()
    sequences = [TokenSequence.from_prompt_and_response(prompt, answer) for answer in answers]
    group = Group(sequences, scores=[1.0, 0.0, 0.5, 0.2])
    rows = []
    for engine in (EngineOptions(schedule="bounded", max_tokens_per_chunk=chunk), FULL):
        step = make_step(LONG_PROMPT, [[group]], engine)
        losses = [step.run()]
        resident = step.resident_bytes()
        total = peak_bytes(lambda losses=losses, step=step: losses.append(step.run()), torch.device("cpu"), resident)
        rows.append({"schedule": engine.schedule, "losses": losses, "peak_bytes": total, "resident_bytes": resident})
    sizes = LONG_PROMPT
    per_token = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * torch.float32.itemsize
    return {
        "prompt_tokens": num_tokens,
        "max_tokens_per_chunk": chunk,
        "rows": rows,
        "prefix_kv_bytes": per_token * num_tokens,
    }


def grpo(options: SweepOptions) -> dict[str, Any]:
    """game24: updates of GRPO on fixed samples, with 100 responses per prompt and 16 of them, bounded and full."""
    chunk = 64 if options.dry_run else 512
    bounded = EngineOptions(schedule="bounded", max_tokens_per_chunk=chunk)
    source, sizes, _ = _game24(options)
    counts = (4, 8) if options.dry_run else (16, 100)
    group = next(group for group in source if len(set(first_responses(group, counts[0]).scores or ())) > 1)
    # The samples come from another model; the policy before training stands in for it.
    loss = make_loss("grpo", old="reference", beta=0.04)
    rows = []
    for num_responses in counts:
        for engine in (bounded, FULL):
            step = make_step(sizes, [[first_responses(group, num_responses)]], engine, loss=loss)
            batch = step.batches[0]
            step = replace(step, references=[score(step.model, batch, engine)])
            losses = [step.run() for _ in range(3)]
            row = {"schedule": engine.schedule, "num_responses": num_responses, "tokens": batch.num_unique_tokens}
            rows.append(row | {"losses": losses} | step.peak())
    by_count = {row["num_responses"]: row["peak_bytes"] for row in rows if row["schedule"] == "bounded"}
    few, many = (by_count[count] for count in counts)
    return {"max_tokens_per_chunk": chunk, "rows": rows, "peak_ratio": many / few}


def first_responses(group: Group, count: int) -> Group:
    """The group with its first `count` responses."""
    scores = None if group.scores is None else group.scores[:count]
    return Group(group.sequences[:count], scores=scores, id=group.id)


def _game24(options: SweepOptions) -> tuple[list[Group], LlamaSizes, tuple[int, int]]:
    """Groups, the model, and the two numbers of responses to compare."""
    if options.dry_run:
        return read_groups(replace(GAME24, sizes=DRY_RUN), options), DRY_RUN, (4, 8)
    return read_groups(GAME24, options), SMALL, (10, 100)


PARTS: dict[str, Callable[[SweepOptions], dict[str, Any]]] = {
    "responses": responses,
    "sharing": sharing,
    "grpo": grpo,
    "long_prompt": long_prompt,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be given again")
    parser.add_argument("--dry-run", action="store_true", help="tiny and made up: shows that everything runs")
    parser.add_argument("--clock", default="wall", help="as for sweeps.py")
    args = parser.parse_args()
    options = SweepOptions(device=torch.device("cpu"), dry_run=args.dry_run, clock=args.clock)
    path = results_folder(keep=not args.dry_run) / "memory.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    console = Console(stderr=True)
    for name in args.only or PARTS:
        measure = partial(PARTS[name], options)
        found[name] = measure() | {"provenance": asdict(Provenance.collect(options.device))}
        console.print(name, found[name])
        path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
