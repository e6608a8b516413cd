"""The modes on the same step: first whether their results agree, then what each one takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kvpref.engine.options import EngineOptions
from kvpref.errors import InputError
from kvpref.losses import LossFunction, PreferenceLoss
from kvpref.profiling.compare.comparison import Case, CaseResult, compare
from kvpref.profiling.precision import compute_dtype
from kvpref.profiling.steps import BASELINE_MODE, StepOutcome, TrainStep, make_micro_batches
from kvpref.profiling.timing import TimingOptions
from kvpref.records.groups import Group

Cut = Sequence[Sequence[Group]]
"""The groups of each micro-batch of a step."""

# Sums over thousands of tokens in a different order; a wrong prompt or position costs whole nats. In 16 bits a token's
# log-prob is off by a few hundredths of a nat, and a loss reads sums over whole responses.
_TOLERANCE = {torch.float64: StepOutcome(1e-9, 1e-9), torch.float32: StepOutcome(1e-4, 1e-4)}
_TOLERANCE_16_BIT = StepOutcome(loss=0.1, mean_token_logp=2e-2)


@dataclass(frozen=True, kw_only=True)
class ModeComparison:
    """What the modes took for one step, and what they computed."""

    results: tuple[CaseResult, ...]
    """One result per timed mode."""

    outcomes: Mapping[str, StepOutcome]
    """What each mode computed before anything was timed."""

    different: Mapping[str, str]
    """Modes that were not timed because their results differ from the baseline's: mode -> difference."""


def compare_modes(
    model: nn.Module,
    cuts: Mapping[str, Cut],
    loss: PreferenceLoss | LossFunction,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    backend: str = "auto",
    options: TimingOptions | None = None,
    with_memory: bool = True,
    on_start: Callable[[str], None] = lambda mode: None,
) -> ModeComparison:
    """Run one training step in every mode.

    Args:
        model: Attached model. With an optimizer its weights change from run to run.
        cuts: Mode -> the step's groups as it cuts them into micro-batches; the same groups in every mode.
        loss: As for `kvpref.forward_backward`.
        optimizer: Part of the step, if given.
        backend: Attention backend, or ``auto``.
        options: Rounds and warm-up.
        with_memory: As in `compare`.
        on_start: Called with the mode whose results are computed next.

    Raises:
        InputError: If the baseline mode is missing. As `kvpref.forward_backward` otherwise.
    """
    if BASELINE_MODE not in cuts:
        raise InputError(f"modes are compared with {BASELINE_MODE!r}; it must be among them")
    parameter = next(model.parameters())
    steps: dict[str, TrainStep] = {}
    outcomes: dict[str, StepOutcome] = {}
    for mode, cut in cuts.items():
        on_start(mode)
        micro_batches = make_micro_batches(model, cut, loss, mode=mode, device=parameter.device)
        steps[mode] = TrainStep(model, loss, micro_batches, mode, optimizer, EngineOptions(mode=mode, backend=backend))
        outcomes[mode] = steps[mode].check()
    tolerance = _TOLERANCE.get(compute_dtype(model), _TOLERANCE_16_BIT)
    different = find_differences(outcomes, tolerance)
    cases = [step_case(step) for mode, step in steps.items() if mode not in different]
    results = compare(cases, baseline=BASELINE_MODE, device=parameter.device, options=options, with_memory=with_memory)
    return ModeComparison(results=results, outcomes=outcomes, different=different)


def step_case(step: TrainStep) -> Case:
    """A step as a case, named after its mode, with its counts."""
    work = step.work()
    batches = [item.batch for item in step.micro_batches]
    return Case(
        name=step.mode,
        run=step.run,
        flops=step.flops().total,
        resident_bytes=step.resident_bytes,
        facts={
            "num_micro_batches": len(batches),
            "num_sequences": sum(batch.num_sequences for batch in batches),
            "total_tokens": sum(batch.num_total_tokens for batch in batches),
            "unique_tokens": sum(batch.num_unique_tokens for batch in batches),
            "forward_tokens": work.num_tokens,
            "attention_pairs": work.num_pairs,
            "scored_tokens": work.num_scored,
        },
    )


def find_differences(
    outcomes: Mapping[str, StepOutcome], tolerance: StepOutcome, baseline: str = BASELINE_MODE
) -> dict[str, str]:
    """The modes whose loss or mean log-prob differs from the baseline mode's, and by how much.

    Args:
        outcomes: Mode -> its results, including the baseline mode.
        tolerance: Largest allowed difference of each value, relative to the baseline's value if that is above 1.
        baseline: The mode that the others are compared with.
    """
    truth = outcomes[baseline]
    different = {}
    for mode, outcome in outcomes.items():
        for name, value, expected, allowed in zip(outcome._fields, outcome, truth, tolerance, strict=True):
            # Written so that NaN counts as a difference.
            if not abs(value - expected) <= allowed * max(1.0, abs(expected)):
                different[mode] = f"{name} is {value:.6g}, in {baseline} it is {expected:.6g}"
    return different
