"""The modes on the same batches: time, tokens through the layers, and whether losses and gradients agree."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from kvpref.data import PreferenceDataset, StepBatcher, StepOptions
from kvpref.engine.passes import response_logps
from kvpref.engine.schedules import forward_backward
from kvpref.losses import DPO
from kvpref.plan.batch import Batch, collate
from kvpref.profiling.timing import TimingOptions, time_rounds
from kvpref.records.outputs import ResponseLogps

MODES = ("two_pass", "packed", "padded")


class ComparedBatch(NamedTuple):
    """One step's groups, collated for every mode, and their reference log-probs."""

    batch: Batch
    reference: ResponseLogps


@dataclass(frozen=True, kw_only=True)
class ModeCost:
    """What one mode took for forward and backward, per optimizer step."""

    mode: str

    time_ms: float
    """Median over the rounds of the mean time of a step."""

    num_forward_tokens: float
    """Tokens through the layers, padding included, mean over the steps."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The costs of all modes, and how far apart their results are."""

    costs: tuple[ModeCost, ...]
    """In the order of `MODES`."""

    max_loss_difference: float
    """Largest relative difference of a step's loss between two modes."""

    max_gradient_difference: float
    """Largest distance between two modes' gradients of a step, relative to the gradient's norm."""

    def ratios(self, mode: str) -> tuple[float, float]:
        """How many times the tokens and the time of ``two_pass`` another mode takes."""
        by_mode = {cost.mode: cost for cost in self.costs}
        shared, other = by_mode["two_pass"], by_mode[mode]
        return other.num_forward_tokens / shared.num_forward_tokens, other.time_ms / shared.time_ms


@torch.no_grad()
def prepare_batches(
    model: nn.Module, groups: PreferenceDataset, *, groups_per_step: int, num_steps: int
) -> list[ComparedBatch]:
    """Batches as the trainer makes them, with the current log-probs of `model` as the reference.

    The trainer groups prompts of similar length, so ``padded`` is not charged for padding that it can avoid.
    """
    model.eval()
    batcher = StepBatcher(groups.lengths, StepOptions(groups_per_step=groups_per_step), groups.group_ids)
    batches = []
    for step in batcher.steps()[:num_steps]:
        indices = step[0][0].group_indices
        batch = collate([groups[index] for index in indices], modes=MODES)
        batches.append(ComparedBatch(batch, response_logps(model, batch)))
    return batches


def compare_modes(model: nn.Module, batches: list[ComparedBatch], loss: DPO, num_rounds: int) -> Comparison:
    """Run forward and backward of every mode on every batch; the parameters do not change.

    Modes take turns within each round, in one process, so that whatever else the machine does affects all equally.
    """
    model.train()
    # The first run of each mode, which also warms up, gives the results to compare.
    differences = [_differences(model, item, loss) for item in batches]
    rounds = time_rounds(
        {mode: partial(_run_all, model, batches, loss, mode) for mode in MODES},
        next(model.parameters()).device,
        TimingOptions(num_rounds=num_rounds, num_warmup=0),
    )
    model.zero_grad()
    costs = tuple(
        ModeCost(
            mode=mode,
            time_ms=statistics.median(rounds[mode]) / len(batches),
            num_forward_tokens=statistics.mean(item.batch.plan(mode).num_forward_tokens for item in batches),
        )
        for mode in MODES
    )
    return Comparison(
        costs=costs,
        max_loss_difference=max(loss_difference for loss_difference, _ in differences),
        max_gradient_difference=max(gradient_difference for _, gradient_difference in differences),
    )


def _run_all(model: nn.Module, batches: list[ComparedBatch], loss: DPO, mode: str) -> None:
    for item in batches:
        _run(model, item, loss, mode)


def _run(model: nn.Module, item: ComparedBatch, loss: DPO, mode: str) -> float:
    """Forward and backward of one batch; its loss."""
    model.zero_grad()
    # Log-probs are in order of sequences in every mode, so one reference serves all.
    return forward_backward(model, item.batch, loss, reference=item.reference, mode=mode).loss.item()


def _differences(model: nn.Module, item: ComparedBatch, loss: DPO) -> tuple[float, float]:
    """The largest relative differences of loss and gradient between two modes on one batch."""
    losses, gradients = [], []
    for mode in MODES:
        losses.append(_run(model, item, loss, mode))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    pairs = [(i, j) for i in range(len(MODES)) for j in range(i)]
    return (
        max(abs(losses[i] - losses[j]) / max(abs(losses[i]), abs(losses[j])) for i, j in pairs),
        max(((gradients[i] - gradients[j]).norm() / gradients[i].norm()).item() for i, j in pairs),
    )
