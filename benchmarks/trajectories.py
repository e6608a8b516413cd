"""Forward and backward over an agent's attempts at a task, whole and as one row per model call, against `packed`.

`full` runs in modes `two_pass` and `one_pass`. `bounded` runs chunks whose activations it does not keep a second time
for their gradients; its FLOPs count that. All peaks are reported beside that of `packed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from forward_backward import mean_nll
from llama_models import DRY_RUN, MEDIUM, LlamaSizes, build_model
from options import SweepOptions
from trajectory_data import Rows, made_up_trajectories, read_trajectories

from kvpref import Group, Sequence
from kvpref.engine.options import EngineOptions
from kvpref.errors import RunError
from kvpref.models.shape import ModelShape, model_shape
from kvpref.plan.chunks import ChunkPlan
from kvpref.plan.flops import Work, total_work
from kvpref.plan.step import join_batches
from kvpref.prefix.rules import CAUSAL
from kvpref.profiling.compare.comparison import Case, CaseResult, Comparison, compare
from kvpref.profiling.compare.modes import find_differences, step_case
from kvpref.profiling.compare.report import Column
from kvpref.profiling.steps import StepOutcome, TrainStep, make_micro_batches

TITLE = "forward + backward of an agent's attempts at a task"
BAR = 0.88
MAX_PASSES = 4
"""Bar of the passes over a micro-batch in mode `two_pass`."""

BASELINE = "packed"


MAX_TOKENS_PER_CHUNK = 1024
ROWS: Mapping[str, Rows] = {"4 attempts, whole": "whole", "4 attempts, per call": "per call"}


def rows(options: SweepOptions) -> dict[str, Callable[[], Comparison]]:
    """Name -> what measures that row."""
    if options.gpu_rows:
        return {}
    return {name: partial(_measure, name, shape, options) for name, shape in ROWS.items()}


def _measure(name: str, shape: Rows, options: SweepOptions) -> Comparison:
    """Check that all cases compute the same, and time them.

    Raises:
        RunError: If they do not; nothing is timed then.
    """
    group = take_group(shape, options)
    chunk_tokens = 64 if options.dry_run else MAX_TOKENS_PER_CHUNK
    variants = {
        "two_pass": EngineOptions(),
        "one_pass": EngineOptions(mode="one_pass"),
        "bounded": EngineOptions(schedule="bounded", max_tokens_per_chunk=chunk_tokens),
        BASELINE: EngineOptions(mode="packed"),
    }
    sizes = DRY_RUN if options.dry_run else MEDIUM
    model = build_model(sizes, options)
    cut = [[_folded(group, sizes)]]
    steps = {}
    for case, engine in variants.items():
        batches = make_micro_batches(model, cut, mean_nll, mode=engine.mode, device=options.device)
        steps[case] = TrainStep(model, mean_nll, batches, engine.mode, options=engine)
    outcomes = {case: step.check() for case, step in steps.items()}
    # float32: sums over thousands of tokens in another order; a wrong prefix costs whole nats.
    different = find_differences(outcomes, StepOutcome(1e-4, 1e-4), BASELINE)
    if different:
        raise RunError("; ".join(f"{case}: {how}" for case, how in different.items()))
    cases = [_case(case, step, model_shape(model)) for case, step in steps.items()]
    results = compare(cases, baseline=BASELINE, device=options.device, options=options.timing, with_memory=True)
    return Comparison(
        name=name,
        baseline=BASELINE,
        results=results,
        facts={
            "group": str(group.id),
            "max_tokens_per_chunk": chunk_tokens,
            "max_passes": MAX_PASSES,
            "passes met": int(_passes(results, "two_pass") <= MAX_PASSES),
            **{f"loss {case}": outcome.loss for case, outcome in outcomes.items()},
        },
        bar=None if options.dry_run else BAR,
    )


def take_group(shape: Rows, options: SweepOptions) -> Group:
    """The attempts at the task with the fewest tokens; with `--quick` two turns of each."""
    if options.dry_run:
        return made_up_trajectories(shape, num_tasks=1, turns=3)[0]
    groups = read_trajectories(options, shape, max_turns=2 if options.quick else None)
    whole = groups if shape == "whole" else read_trajectories(options, "whole")
    tokens = [sum(map(len, group.parts)) for group in whole]
    return groups[tokens.index(min(tokens))]


def _folded(group: Group, sizes: LlamaSizes) -> Group:
    # As for other real files: equal prefixes stay equal, and the ideal is counted on the same tokens.
    sequences = [Sequence(s.ids % sizes.vocab_size, s.flags) for s in group.sequences]
    return Group(sequences, scores=group.scores, id=group.id)


def _case(name: str, step: TrainStep, shape: ModelShape) -> Case:
    case = replace(step_case(step), name=name)
    (item,) = step.micro_batches
    passes = len(item.batch.plan(step.mode).passes)
    if step.options.schedule != "bounded":
        return replace(case, facts={**case.facts, "num_passes": passes})
    limit = step.options.max_tokens_per_chunk
    again = run_again(join_batches([item.batch], max_tokens_per_chunk=limit).chunks.all, limit)
    facts = {**case.facts, "num_passes": passes, "num_chunks": again.num_chunks, "tokens_again": again.work.num_tokens}
    return replace(case, flops=case.flops + again.flops(shape), facts=facts | {"flops_once": case.flops})


@dataclass(frozen=True)
class RunAgain:
    """What `bounded` computes twice."""

    num_chunks: int
    """Chunks of the step."""

    work: Work
    """Of those whose activations are not kept, forward."""

    def flops(self, shape: ModelShape) -> int:
        """Of their second forward pass: one of three products of linear layers, two of seven of attention, one of four
        of the head (`ModelShape.flops`)."""
        whole = shape.flops(self.work)
        return whole.linear // 3 + whole.attention * 2 // 7 + whole.head // 4


def run_again(chunks: tuple[ChunkPlan, ...], limit: int | None) -> RunAgain:
    """The chunks before the last ones, of which as many are kept as `limit` allows."""
    kept, total = 0, 0
    for chunk in reversed(chunks):
        total += chunk.num_tokens
        if limit is not None and total > limit:
            break
        kept += 1
    works = [
        Work(
            num_tokens=chunk.num_tokens,
            num_pairs=sum(b.num_attended_pairs for level in chunk.item.levels_under(CAUSAL) for b in level.blocks),
            num_scored=len(chunk.targets),
        )
        for chunk in chunks[: len(chunks) - kept]
    ]
    return RunAgain(len(chunks), total_work(works))


def _passes(results: tuple[CaseResult, ...], name: str) -> int:
    (found,) = [int(result.facts["num_passes"]) for result in results if result.name == name]
    return found


def _passes_text(result: CaseResult) -> str:
    chunks = result.facts.get("num_chunks")
    return f"{chunks} chunks" if chunks is not None else f"{result.facts['num_passes']}"


def _peak_text(result: CaseResult) -> str:
    return "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f} MiB"


COLUMNS = (Column("passes", _passes_text), Column("peak", _peak_text))
"""What its table shows besides."""
