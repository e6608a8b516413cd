"""Compares one peer with kvpref: first the numbers, then, only if they agree, the time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple

from peers.agreement import check_agreement, check_losses
from peers.interface import DisagreementError, Peer, Runner, StepWork
from peers.task import Task

Verdict = Literal["timed", "compared", "refused", "cannot run"]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One runner's training. Lists over rounds hold lists over optimizer steps."""

    seconds: list[list[float]]
    """Of each whole step: data, forward, backward, clipping, optimizer."""

    optimizer_seconds: list[list[float]]
    """The optimizer's share of each step."""

    precompute_seconds: list[float | None]
    """Of the reference log-probs of all batches, per round; not in `seconds`."""

    system_seconds: list[list[float]]
    """CPU time that the operating system took in each step: mostly handing out memory pages."""

    losses: list[float]
    """Of each step, in the first round."""

    work: list[StepWork]
    """What each step computes."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """kvpref and a peer, taking turns step by step.

    The first step of each round sets up the optimizer and the allocator, so it counts in no ratio and no median, unless
    it is the only one.
    """

    ours: Side
    """kvpref."""

    theirs: Side
    """The peer."""

    @property
    def first_counted(self) -> int:
        """Index of the first step that counts; the ones before are warm-up."""
        return min(1, len(self.ours.work) - 1)

    @property
    def speedup(self) -> float:
        """Median over steps and rounds of the ratio of neighbours in time: slow phases of the machine cancel."""
        return median(
            their / our
            for ours, theirs in zip(self.ours.seconds, self.theirs.seconds, strict=True)
            for our, their in list(zip(ours, theirs, strict=True))[self.first_counted :]
        )

    @property
    def ideal(self) -> float:
        """Median over steps of the ratio of FLOPs."""
        pairs = list(zip(self.ours.work, self.theirs.work, strict=True))
        return median(their.flops.total / our.flops.total for our, their in pairs[self.first_counted :])

    @property
    def total_speedup(self) -> float:
        """Ratio of all counted steps' time together, where long batches weigh more."""
        return sum(self.counted_seconds(self.theirs)) / sum(self.counted_seconds(self.ours))

    @property
    def total_ideal(self) -> float:
        """Ratio of all counted steps' FLOPs together."""
        return self.counted_flops(self.theirs) / self.counted_flops(self.ours)

    def counted_seconds(self, side: Side) -> list[float]:
        """Seconds of the counted steps of all rounds."""
        return [seconds for steps in side.seconds for seconds in steps[self.first_counted :]]

    def counted_flops(self, side: Side) -> int:
        """FLOPs of the counted steps of one round."""
        return sum(work.flops.total for work in side.work[self.first_counted :])

    def system_share(self, side: Side) -> float:
        """The operating system's share of the counted steps' time."""
        system = [seconds for steps in side.system_seconds for seconds in steps[self.first_counted :]]
        return sum(system) / sum(self.counted_seconds(side))

    def optimizer_share(self, side: Side) -> float:
        """The optimizer's share of the counted steps' time."""
        optimizer = [seconds for steps in side.optimizer_seconds for seconds in steps[self.first_counted :]]
        return sum(optimizer) / sum(self.counted_seconds(side))

    def spread(self, side: Side) -> float:
        """Median over counted steps of (longest - shortest) / median over the rounds."""
        by_step = list(zip(*side.seconds, strict=True))[self.first_counted :]
        return median((max(times) - min(times)) / median(times) for times in by_step)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result for one peer."""

    peer: Peer
    """The peer."""

    verdict: Verdict
    """``compared`` is: numbers agree, but there is nothing to time."""

    reason: str | None = None
    """Why it was not timed."""

    agreement: dict[str, float | None] | None = None
    """Relative differences on the first batch, from `check_agreement`."""

    loss_difference: float | None = None
    """Largest relative difference of the losses of all steps."""

    timing: Timing | None = None
    """Only with the verdict ``timed``."""


def compare(peer: Peer, task: Task, *, num_rounds: int, progress: Callable[[str], None]) -> Comparison:
    """Compare a peer with kvpref on a task that has batches.

    Args:
        peer: The peer.
        task: The task.
        num_rounds: Trainings of each, from the same weights.
        progress: Gets a line now and then.
    """
    reason = peer.missing()
    if reason is not None:
        return Comparison(peer=peer, verdict="cannot run", reason=reason)
    progress(f"{peer.name}: first batch")
    ours = peer.opponent(task)
    our_first = ours.first_batch()
    try:
        theirs = peer.runner(task)
        agreement = check_agreement(our_first, theirs.first_batch())
    except DisagreementError as error:
        return Comparison(peer=peer, verdict="refused", reason=str(error))
    except Exception as error:  # other people's code, with versions it may not have been written for
        return Comparison(peer=peer, verdict="cannot run", reason=f"{type(error).__name__}: {error}")
    reason = peer.untimed(task)
    if reason is not None:
        return Comparison(peer=peer, verdict="compared", reason=f"not timed: {reason}", agreement=agreement)
    timing = _race(_rounds(peer, task, (ours, theirs), num_rounds), peer.name, progress)
    try:
        difference = check_losses(timing.ours.losses, timing.theirs.losses)
    except DisagreementError as error:
        return Comparison(peer=peer, verdict="refused", reason=str(error), agreement=agreement)
    return Comparison(peer=peer, verdict="timed", agreement=agreement, loss_difference=difference, timing=timing)


def _rounds(peer: Peer, task: Task, checked: tuple[Runner, Runner], num_rounds: int) -> Iterator[tuple[Runner, Runner]]:
    """Runners for each round; those that were checked still have the initial weights and take the first."""
    yield checked
    for _ in range(num_rounds - 1):
        yield peer.opponent(task), peer.runner(task)


def _race(rounds: Iterator[tuple[Runner, Runner]], name: str, progress: Callable[[str], None]) -> Timing:
    sides = tuple(_empty_side() for _ in range(2))
    for index, runners in enumerate(rounds):
        works = [runner.work() for runner in runners]
        streams = [runner.steps() for runner in runners]  # reference log-probs are computed here
        turns = _take_turns(streams, len(works[0]), f"{name}: round {index + 1}", progress)
        for side, runner, work, steps in zip(sides, runners, works, turns, strict=True):
            side.seconds.append([step.seconds for step in steps])
            side.system_seconds.append([step.system_seconds for step in steps])
            side.optimizer_seconds.append(list(runner.optimizer_seconds))
            side.precompute_seconds.append(runner.precompute_seconds)
            if index == 0:
                side.losses.extend(step.loss for step in steps)
                side.work.extend(work)
    return Timing(ours=sides[0], theirs=sides[1])


def _empty_side() -> Side:
    return Side(seconds=[], system_seconds=[], optimizer_seconds=[], precompute_seconds=[], losses=[], work=[])


class _Step(NamedTuple):
    """One optimizer step, measured from outside."""

    loss: float
    seconds: float
    system_seconds: float


def _take_turns(
    streams: list[Iterator[float]], num_steps: int, label: str, progress: Callable[[str], None]
) -> list[list[_Step]]:
    """The steps of each stream. Who goes first changes from step to step."""
    turns: list[list[_Step]] = [[] for _ in streams]
    for step in range(num_steps):
        order = range(len(streams)) if step % 2 == 0 else reversed(range(len(streams)))
        for position in order:
            turns[position].append(_time_step(streams[position]))
        progress(f"{label}, step {step + 1}: " + " | ".join(f"{steps[-1].seconds:.2f} s" for steps in turns))
    for stream in streams:
        if next(stream, None) is not None:
            raise RuntimeError(f"{label}: more steps than the task's {num_steps}")
    return turns


def _time_step(stream: Iterator[float]) -> _Step:
    started, system_started = time.perf_counter(), os.times().system
    loss = next(stream)
    return _Step(loss, time.perf_counter() - started, os.times().system - system_started)
