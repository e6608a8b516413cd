"""Run under torchrun by test_fsdp2: cases of `CASES`, or checks, one after another."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp2_cases import CASES
from fsdp2_runs import Case, make_trainer, train_case
from two_processes import leave_together

import kvpref
from kvpref.engine import bounded as bounded_schedule
from kvpref.parallel.whole_weights import whole

LOG_TWO = 0.6931471805599453


def resumes(folder: Path) -> None:
    """An adapter goes on from a checkpoint in pieces, with the state of Adam, to the weights of an unbroken run."""
    case = Case(adapter=True)
    settings = {"optim": "adamw_torch", "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 2}
    found = []
    for checkpoint in (None, str(folder / "checkpoint-2")):
        trainer = make_trainer(folder, case, num_steps=4, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append({name: whole(weight) for name, weight in trainer.model.named_parameters()})
    for name, weight in found[0].items():
        assert torch.allclose(found[1][name], weight, rtol=0, atol=1e-12), name


def stops_together(folder: Path) -> None:
    """A loss that is NaN on one rank stops all of them, with that rank and the groups."""

    def loss(policy: Any, reference: Any, batch: kvpref.Batch) -> kvpref.LossOutput:
        is_bad = any(group.id == "made:2" for group in batch.groups)
        return kvpref.LossOutput(loss=policy.sum().mean() * (float("nan") if is_bad else 1.0), metrics={})

    trainer = make_trainer(folder, Case(), given_loss=loss)
    with pytest.raises(kvpref.RunError, match=r"the loss is nan.*on rank \d.*made:"):
        trainer.train()


def starts_at_log_two(folder: Path) -> None:
    """In bf16 the reference is computed as the policy is, so their first difference is nothing."""
    for name, settings in {"copy": {"precompute_reference": False}, "stored": {}}.items():
        trainer = make_trainer(folder / name, Case(settings=settings), num_steps=1, bf16=True, dtype=torch.float32)
        trainer.train()
        # Stored log-probs come from other micro-batches, whose sums are rounded otherwise.
        assert trainer.state.log_history[0]["loss"] == pytest.approx(LOG_TWO, abs=1e-6 if name == "copy" else 5e-3)


def is_not_evaluated_before(folder: Path) -> None:
    trainer = make_trainer(folder, Case())
    with pytest.raises(kvpref.InputError, match="eval_on_start"):
        trainer.evaluate()


def repeats_together(folder: Path) -> None:
    """Memory that runs out on one rank makes all of them repeat the step with smaller chunks."""
    bounded = {"schedule": "bounded", "max_tokens_per_chunk": 40, "gather_weights": "step", "reduce_grads": "step"}
    for fsdp in ("full_shard", ""):
        found = []
        for fails in (False, True):
            settings = {**bounded, "auto_budget": fails, "fsdp": fsdp}
            trainer = make_trainer(folder, Case(settings=settings), num_steps=3)
            with pytest.MonkeyPatch.context() as patch:
                if fails and trainer.args.process_index == 1:
                    _fail_once(patch, chunk=4)
                trainer.train()
            found.append({name: whole(weight).detach() for name, weight in trainer.model.named_parameters()})
        assert trainer._step_runner.settings.options.max_tokens_per_chunk == 20, "on every rank"
        for name, weight in found[0].items():
            assert torch.allclose(found[1][name], weight, rtol=0, atol=1e-10), name


def _fail_once(patch: pytest.MonkeyPatch, chunk: int) -> None:
    """Run out of memory in this chunk, counted over all passes."""
    original, calls = bounded_schedule._ChunkRunner._run, count(1)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == chunk:
            raise torch.OutOfMemoryError("made up")
        return original(self, *args, **kwargs)

    patch.setattr(bounded_schedule._ChunkRunner, "_run", run)


CHECKS = {
    check.__name__: check
    for check in (resumes, stops_together, starts_at_log_two, is_not_evaluated_before, repeats_together)
}


if __name__ == "__main__":
    for name in sys.argv[2:]:
        folder = Path(sys.argv[1]) / name
        if name in CHECKS:
            CHECKS[name](folder)
        else:
            train_case(folder, CASES[name])
    leave_together()
