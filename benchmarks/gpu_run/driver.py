"""Runs the stages in worker processes and keeps what they find; standard library only."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from gpu_run.process import WORKER, Event, WorkerProcess
from gpu_run.results import Results, broken, not_run, row_line
from gpu_run.stages import STAGES, TOTAL_S, Stage


class RefusedError(Exception):
    """Raised if nothing can run here; the message says why."""


@dataclass(kw_only=True)
class Progress:
    """Progress of a stage."""

    stage: Stage
    names: list[str] | None = None
    """All rows; None before the worker has told them."""

    num_done: int = 0
    running: str | None = None
    row_ends: float = field(default=float("inf"))
    """When the running row is stopped, on the clock `time.monotonic`."""

    @property
    def is_over(self) -> bool:
        """Whether every row has ended."""
        return self.names is not None and self.num_done >= len(self.names)


class Driver:
    """One GPU run.

    Args:
        results: Where rows go.
        log: Gets what workers print.
        dry_run: One worker for all stages, tiny shapes, the CPU.
        budget_s: Seconds for everything.
        stages: What to run.
        script: What runs in the workers.
    """

    def __init__(
        self,
        results: Results,
        log: Path,
        *,
        dry_run: bool,
        budget_s: float = TOTAL_S,
        stages: tuple[Stage, ...] = STAGES,
        script: Path = WORKER,
    ) -> None:
        self.results, self.dry_run, self.budget_s, self.stages = results, dry_run, budget_s, stages
        self._start_worker = partial(WorkerProcess, log, script)
        self._worker: WorkerProcess | None = None
        self._spare: WorkerProcess | None = None

    def run(self) -> None:
        """All stages.

        Raises:
            RefusedError: If there is no device.
        """
        started = time.monotonic()
        ends = started
        try:
            for stage in self.stages:
                # What a stage leaves over goes to the next ones.
                ends = min(ends + stage.limit_s, started + self.budget_s)
                began = time.monotonic()
                self._run_stage(stage, ends)
                self.results.stage_seconds[stage.name] = time.monotonic() - began
                self.results.write()
        finally:
            self.stop()

    def stop(self) -> None:
        """End all processes."""
        for worker in (self._worker, self._spare):
            if worker is not None:
                worker.stop()
        self._worker = self._spare = None

    def _run_stage(self, stage: Stage, ends: float) -> None:
        print(f"--- {stage.name}: {stage.title}", flush=True)
        progress = Progress(stage=stage)
        while not progress.is_over:
            if time.monotonic() >= ends:
                self._out_of_time(progress)
                return
            worker = self._take_worker()
            worker.send(
                {
                    "stage": stage.name,
                    "start": progress.num_done,
                    "count": 1 if stage.process_per_row and not self.dry_run else None,
                    "dry_run": self.dry_run,
                    "with_about": self.results.about is None,
                }
            )
            before = progress.num_done
            keep = self._follow(worker, progress, ends)
            if progress.names is not None and progress.num_done == before and not progress.is_over:
                # It died before its first row: without this, so would the next one, for ever.
                self._add(progress, progress.names[before], broken(worker.why_it_ended()))
            if not (keep and self.dry_run):
                worker.stop()
                self._worker = None
            if progress.names is None:
                return

    def _follow(self, worker: WorkerProcess, progress: Progress, ends: float) -> bool:
        """Listen to a worker until its job ends; return whether the worker is still usable."""
        while True:
            try:
                event = worker.next_event(min(ends, progress.row_ends) - time.monotonic())
            except TimeoutError:
                worker.stop()
                self._stopped(progress, ends)
                return False
            if event is None:
                self._died(worker, progress)
                return False
            if event["event"] == "done":
                return True
            self._take(event, progress)

    def _take(self, event: Event, progress: Progress) -> None:
        match event["event"]:
            case "about":
                self.results.about = event["about"]
            case "rows":
                progress.names = event["names"]
            case "start":
                progress.running = event["name"]
                progress.row_ends = time.monotonic() + progress.stage.row_limit_s
            case "row":
                self._add(progress, event["name"], event["finding"])
            case "refused":
                raise RefusedError(event["reason"])

    def _add(self, progress: Progress, name: str, finding: Event) -> None:
        progress.num_done += 1
        progress.running, progress.row_ends = None, float("inf")
        self.results.add(progress.stage, name, finding)
        print(f"  {row_line(self.results.rows[-1])}", flush=True)

    def _died(self, worker: WorkerProcess, progress: Progress) -> None:
        if progress.names is None:
            self._add(progress, "start", broken(worker.why_it_ended()))
        elif progress.running is not None:
            self._add(progress, progress.running, broken(worker.why_it_ended()))
        # Else it ended after a row that had a CUDA error, which is known: the next worker goes on.

    def _stopped(self, progress: Progress, ends: float) -> None:
        """Record that a worker was stopped by the time limit of its row or its stage."""
        if progress.running is not None and progress.row_ends <= ends:
            self._add(progress, progress.running, broken(f"stopped after {progress.stage.row_limit_s:.0f} s"))
        else:
            self._out_of_time(progress)

    def _out_of_time(self, progress: Progress) -> None:
        names = ["start"] if progress.names is None else progress.names
        progress.names = names
        for name in names[progress.num_done :]:
            self._add(progress, name, not_run("the time of this stage is spent"))

    def _take_worker(self) -> WorkerProcess:
        """Return a worker, with its imports done if there was time, and start the next one."""
        if self._worker is None:
            self._worker, self._spare = self._spare or self._start_worker(), None
        if self._spare is None and not self.dry_run:
            self._spare = self._start_worker()
        return self._worker
