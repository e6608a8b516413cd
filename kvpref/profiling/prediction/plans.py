"""Plans of several variants, made side by side: predicting is Python's work on fake tensors, for one core each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from kvpref.engine.options import EngineOptions
from kvpref.profiling.prediction import fit
from kvpref.profiling.prediction.fit import VariantPlan
from kvpref.profiling.prediction.peak import Predictor, traced_as
from kvpref.profiling.prediction.step import GroupShape

_Plan = Callable[[str], VariantPlan]


def plan_variants(
    variants: Mapping[str, EngineOptions], predictor: Predictor, shape: GroupShape, budget_bytes: int
) -> Iterator[VariantPlan]:
    """Find the largest budgets of variants, in processes forked at once, as many as there are cores for.

    Where processes cannot be forked, or die, variants are planned here, one after the other.

    Args:
        variants: The options by name; their `max_tokens_per_chunk` is found.
        predictor: The predictor of the model.
        shape: The shape of the groups.
        budget_bytes: Memory that a step may hold.

    Returns:
        The plans, in the order in which they are ready.
    """

    def plan(name: str) -> VariantPlan:
        return fit.plan_variant(name, variants[name], predictor, shape, budget_bytes)

    predictor.build()  # once, for all
    jobs = defaultdict(list)
    for name, variant in variants.items():
        jobs[traced_as(variant)].append(name)
    return _finish(variants, plan, _fork(list(jobs.values()), plan))


def _finish(
    names: Mapping[str, EngineOptions], plan: _Plan, futures: Sequence[Future[list[VariantPlan]]]
) -> Iterator[VariantPlan]:
    pending = list(names)
    try:
        for future in as_completed(futures):
            for planned in future.result():
                pending.remove(planned.name)
                yield planned
    except BrokenProcessPool:
        pass
    yield from map(plan, pending)


def _fork(jobs: Sequence[Sequence[str]], plan: _Plan) -> list[Future[list[VariantPlan]]]:
    """The jobs' results; none where one process would have to do all, or forking is not safe."""
    num_workers = min(len(jobs), _num_cores())
    if num_workers == 1 or sys.platform != "linux":
        return []
    # Forked, since importing PyTorch anew takes as long as a plan.
    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(plan,))
    futures = [executor.submit(_run_job, job) for job in jobs]
    executor.shutdown(wait=False)  # once they are done
    return futures


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


_worker_plan: _Plan


def _start_worker(plan: _Plan) -> None:
    global _worker_plan
    _worker_plan = plan
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for all processes; without a traceback here
    torch.set_num_threads(1)  # threads of a pool are not forked
    try:
        torch.ones((), requires_grad=True).backward()
    except RuntimeError:
        # PyTorch refuses backward passes in processes forked after one.
        os._exit(1)


def _run_job(names: Sequence[str]) -> list[VariantPlan]:
    return [_worker_plan(name) for name in names]
