"""Measures cases against a baseline, with the speed-up that their FLOPs allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kvpref.errors import InputError
from kvpref.profiling.compare.spread import Spread
from kvpref.profiling.memory.peak import peak_bytes
from kvpref.profiling.timing import TimingOptions, time_rounds

Fact = int | float | str


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One way to do the work of a comparison."""

    name: str
    """Its name in tables and plots."""

    run: Callable[[], object]
    """Does the work once."""

    flops: int
    """FLOPs of one run."""

    resident_bytes: Callable[[], int] = int
    """Bytes held before a run that stay: weights, optimizer state. Used for peak memory on a CPU."""

    facts: Mapping[str, Fact] = field(default_factory=dict)
    """Counts to report beside the times, such as tokens."""


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """The measurements of one case."""

    name: str

    time_ms: Spread
    """Time of one run, in milliseconds."""

    speedup: Spread
    """Time of the baseline over this case's, within each round."""

    ideal: float
    """FLOPs of the baseline over this case's."""

    efficiency: Spread
    """Speed-up over ideal; 1 means that every saved FLOP saved its share of time."""

    flops: int

    peak_bytes: int | None
    """Most bytes that tensors held at once in one run; None if not measured."""

    rounds_ms: tuple[float, ...]
    """Time per round, in milliseconds."""

    facts: Mapping[str, Fact]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The cases in one setting."""

    name: str
    """The setting, such as a workload."""

    baseline: str
    """Name of the case that the others are compared with."""

    results: tuple[CaseResult, ...]

    facts: Mapping[str, Fact] = field(default_factory=dict)
    """Counts of the setting."""

    bar: float | None = None
    """Efficiency that cases other than the baseline must reach; None for no bar."""

    held: tuple[str, ...] = ()
    """Names of the cases held to it; all if empty."""

    def contenders(self) -> tuple[CaseResult, ...]:
        """The results of all cases except the baseline."""
        return tuple(result for result in self.results if result.name != self.baseline)

    def verdict(self, result: CaseResult) -> str:
        """``met`` or ``missed`` by the median; empty for the baseline and cases without a bar."""
        if self.bar is None or result.name == self.baseline or (self.held and result.name not in self.held):
            return ""
        return "met" if result.efficiency.median >= self.bar else "missed"


def compare(
    cases: Sequence[Case],
    *,
    baseline: str,
    device: torch.device,
    options: TimingOptions | None = None,
    with_memory: bool = True,
) -> tuple[CaseResult, ...]:
    """Time the cases in turns and compare each with the baseline.

    Args:
        cases: Cases with different names, including the baseline.
        baseline: Name of the case that the others are compared with.
        device: Where the work runs.
        options: Rounds and warm-up.
        with_memory: Measure peak memory too, which takes one more run per case on CUDA and two on a CPU.

    Returns:
        One result per case, in their order.

    Raises:
        InputError: If no case is called `baseline`, or two have one name.
    """
    by_name = {case.name: case for case in cases}
    if len(by_name) != len(cases):
        raise InputError(f"cases need different names; got {', '.join(case.name for case in cases)}")
    if baseline not in by_name:
        raise InputError(f"there is no case {baseline!r} to compare with; there are: {', '.join(by_name)}")
    rounds = time_rounds({case.name: case.run for case in cases}, device, options)
    results = []
    for case in cases:
        ratios = [base / own for base, own in zip(rounds[baseline], rounds[case.name], strict=True)]
        speedup, ideal = Spread.of(ratios), by_name[baseline].flops / case.flops
        results.append(
            CaseResult(
                name=case.name,
                time_ms=Spread.of(rounds[case.name]),
                speedup=speedup,
                ideal=ideal,
                efficiency=speedup.scaled(1 / ideal),
                flops=case.flops,
                # After the timed rounds, so that optimizer states and caches exist as in the middle of a training.
                peak_bytes=peak_bytes(case.run, device, case.resident_bytes()) if with_memory else None,
                rounds_ms=rounds[case.name],
                facts=dict(case.facts),
            )
        )
    return tuple(results)
