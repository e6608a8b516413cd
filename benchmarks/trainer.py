"""What the trainer adds to a bare step of forward, backward, clipping and AdamW on the same micro-batch.

The two take turns: after each step of the trainer, inside its callback, the same step runs bare on a second copy of
the model. The trainer's time goes from there to the end of its next step, so it holds loading, collation, the lookup
of reference log-probs, scheduler, logging and callbacks; the bare step gets its batch ready made.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from llama_models import DRY_RUN, SMALL, LlamaSizes, build_model
from options import SweepOptions
from workloads import Shape, make_groups

from kvpref import forward_backward
from kvpref.profiling.compare.comparison import CaseResult, Comparison
from kvpref.profiling.compare.spread import Spread
from kvpref.profiling.timing import CLOCKS

TITLE = "training step: what PreferenceTrainer adds to the bare step"

PAIRS = Shape(prompt=125, response=45, responses=2, groups=9)
"""The mean lengths of the HH pairs; 10 groups are 2150 unique tokens, 9 are 1935, the nearest to 2048."""

BAR = 1 / 1.03
"""The trainer may add 3%."""


def rows(options: SweepOptions) -> dict[str, Callable[[], Comparison]]:
    """Name -> what measures that row; none on a GPU, whose machine may lack `datasets`, which the trainer needs."""
    if options.gpu_rows:
        return {}
    if options.dry_run:
        shape, sizes, num_steps = Shape(prompt=24, response=3, responses=2, groups=2), DRY_RUN, 2
    else:
        shape, sizes, num_steps = PAIRS, SMALL, 6 if options.quick else 14
    return {"2048 unique tokens": partial(measure, shape, sizes, num_steps, options)}


def measure(shape: Shape, sizes: LlamaSizes, num_steps: int, options: SweepOptions) -> Comparison:
    """Train with DPO for one uncounted step and `num_steps` counted ones."""
    from kvpref import PreferenceTrainer, PreferenceTrainingArguments

    bare_model = build_model(sizes, options)
    groups = [make_groups(shape, sizes.vocab_size, seed=seed) for seed in range(num_steps + 1)]
    with tempfile.TemporaryDirectory() as folder:
        args = PreferenceTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=shape.groups,
            max_steps=num_steps + 1,
            learning_rate=1e-6,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = PreferenceTrainer(build_model(sizes, options), args, [group for step in groups for group in step])
        turns = make_turns(trainer, bare_model, CLOCKS[options.clock])
        trainer.add_callback(turns)
        trainer.train()
    return Comparison(
        name="2048 unique tokens",
        baseline="bare step",
        results=(result_of("bare step", turns.bare_ms, turns), result_of("trainer", turns.trainer_ms, turns)),
        facts={"unique_tokens_per_step": turns.num_unique_tokens, "steps": num_steps},
        bar=None if options.dry_run else BAR,
    )


def result_of(name: str, rounds_ms: list[float], turns: Any) -> CaseResult:
    """Both do the same FLOPs, so the ideal is 1."""
    ratio = Spread.of([bare / own for bare, own in zip(turns.bare_ms, rounds_ms, strict=True)])
    return CaseResult(
        name=name,
        time_ms=Spread.of(rounds_ms),
        speedup=ratio,
        ideal=1.0,
        efficiency=ratio,
        flops=0,
        peak_bytes=None,
        rounds_ms=tuple(rounds_ms),
        facts={},
    )


def make_turns(trainer: Any, model: torch.nn.Module, now: Callable[[], float]) -> Any:
    """A callback that runs the bare step after each of the trainer's and takes both times."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.trainer_ms: list[float] = []
            self.bare_ms: list[float] = []
            self.num_unique_tokens = 0
            self._optimizer: torch.optim.Optimizer | None = None
            self._waiting_since: float | None = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ended = now()
            batch, reference = trainer.last_batch
            self.num_unique_tokens = batch.num_unique_tokens
            if self._optimizer is None:
                kind, settings = trainer.get_optimizer_cls_and_kwargs(args)
                self._optimizer = kind(model.parameters(), **settings)
            began = now()
            forward_backward(model, batch, trainer.loss, reference=reference, mode=args.mode)
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            self._optimizer.step()
            model.zero_grad()
            if self._waiting_since is not None:  # the first step of each is a warm-up
                self.trainer_ms.append((ended - self._waiting_since) * 1000)
                self.bare_ms.append((now() - began) * 1000)
            self._waiting_since = now()

    remember_batches(trainer)
    return Turns()


def remember_batches(trainer: Any) -> None:
    """Make the trainer keep its latest micro-batch and reference log-probs."""
    reference_of = trainer.references.for_batch

    def keep(name: str, inputs: Any, batch: Any) -> Any:
        reference = reference_of(name, inputs, batch)
        trainer.last_batch = (batch, reference)
        return reference

    trainer.references.for_batch = keep
