"""`kvpref profile memory`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpref.atomic_files import check_writable
from kvpref.cli.given_data import GivenData
from kvpref.cli.options import (
    BATCH_SIZE,
    BF16,
    COLUMN,
    DATA,
    DATA_WEIGHTS,
    DEFAULT_BATCH_SIZE,
    DEFAULT_DTYPE,
    DTYPE,
    GROUP_BY,
    JSON,
    MAX_TOKENS,
    MAX_TOKENS_PER_CHUNK,
    MODEL_OR_CONFIG,
    SPLIT,
    TOKENIZER,
    check_counts,
)
from kvpref.errors import InputError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvpref.data import PreferenceDataset
    from kvpref.losses import LossFunction, PreferenceLoss
    from kvpref.profiling.memory.report import MemoryReport
    from kvpref.profiling.memory.step import MemoryCase
    from kvpref.records.groups import Group

DEFAULT_VARIANTS = "full,bounded,packed,padded"
LIKELIHOOD = "likelihood"


def memory(
    model: Annotated[str, MODEL_OR_CONFIG],
    data: Annotated[list[str], DATA],
    tokenizer: Annotated[str | None, TOKENIZER] = None,
    split: Annotated[str | None, SPLIT] = None,
    column: Annotated[list[str] | None, COLUMN] = None,
    group_by: Annotated[str | None, GROUP_BY] = None,
    data_weights: Annotated[str | None, DATA_WEIGHTS] = None,
    variants: Annotated[str, typer.Option(help="Of full, bounded, one_pass, packed, padded.")] = DEFAULT_VARIANTS,
    num_responses: Annotated[
        str | None, typer.Option(help="Cut groups down to so many each, such as 2,8,32,64.", show_default="all")
    ] = None,
    batch_size: Annotated[int, BATCH_SIZE] = DEFAULT_BATCH_SIZE,
    max_tokens: Annotated[int | None, MAX_TOKENS] = None,
    max_tokens_per_chunk: Annotated[int | None, MAX_TOKENS_PER_CHUNK] = None,
    loss: Annotated[str, typer.Option(help="One of `kvpref losses`, or likelihood: weighted by scores.")] = LIKELIHOOD,
    dtype: Annotated[str, DTYPE] = DEFAULT_DTYPE,
    bf16: Annotated[bool | None, BF16] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for memory.html, memory.json and memory.png.", show_default="none")
    ] = None,
    json_: Annotated[bool, JSON] = False,
) -> None:
    """Measure what a training step (forward, backward, AdamW) holds in memory, and what it consists of.

    The step's prompts are spread evenly over the data.

    Variants full and bounded are the schedules of mode two_pass; the others are modes. On CUDA, OUTPUT also gets a
    snapshot of the allocator per case, for https://pytorch.org/memory_viz.

    Example: kvpref profile memory ./llama groups.jsonl --num-responses 2,8,32,64 --output memory
    """
    counts, wanted, loss_fn = _parse_counts(num_responses), _parse_variants(variants), _make_loss(loss)
    given = GivenData.of(data, split=split, column=column, group_by=group_by, weights=data_weights)
    check_counts(batch_size=batch_size, max_tokens=max_tokens)
    if output is not None:
        _check_pictures()
        check_writable(output / "memory.json")
    from kvpref.profiling.precision import compute_dtype, use_autocast

    loaded, datasets = _load(model, given, tokenizer, dtype, loss_fn, batch_size, counts)
    use_autocast(loaded, bf16)
    settings = {
        "model": model,
        "data": given.setting,
        "dtype": str(next(loaded.parameters()).dtype),
        "compute_dtype": str(compute_dtype(loaded)),
        "max_tokens_per_micro_batch": max_tokens,
        "max_tokens_per_chunk": max_tokens_per_chunk,
        "loss": loss,
        "optimizer": "AdamW",
    }
    title = f"{Path(model).name} on {given.title}"
    cases = _cases(datasets, wanted, max_tokens, max_tokens_per_chunk)
    report = _measure(loaded, cases, loss_fn, settings, output, title=title)
    _show(report, output)
    if json_:
        print(json.dumps(report.to_json()))
    if not report.profiles:
        raise RunError(f"nothing could be measured: {'; '.join(report.skipped.values())}")


def _parse_counts(text: str | None) -> list[int | None]:
    """The numbers of responses, smallest first; one None for whole groups."""
    if text is None:
        return [None]
    names = [name.strip() for name in text.split(",")]
    if not all(name.isdecimal() and int(name) > 0 for name in names):
        raise InputError(f"--num-responses takes whole numbers from 1 on, separated by commas; got {text!r}")
    return [*sorted({int(name) for name in names})]


def _parse_variants(text: str) -> list[str]:
    from kvpref.profiling.memory.step import VARIANTS

    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown or not names:
        raise InputError(f"unknown variant {', '.join(unknown) or text!r}; choose from: {', '.join(VARIANTS)}")
    return list(dict.fromkeys(names))


def _make_loss(name: str) -> PreferenceLoss | LossFunction:
    from kvpref.losses import LOSSES, make_loss
    from kvpref.profiling.memory.loss import weighted_likelihood

    if name == LIKELIHOOD:
        return weighted_likelihood
    if name not in LOSSES:
        raise InputError(f"unknown loss {name!r}; choose from: {', '.join((LIKELIHOOD, *LOSSES))}")
    return make_loss(name)


def _load(
    model: str,
    data: GivenData,
    tokenizer: str | None,
    dtype: str,
    loss: PreferenceLoss | LossFunction,
    num_groups: int,
    counts: list[int | None],
) -> tuple[PreTrainedModel, dict[int | None, PreferenceDataset]]:
    """The attached model, and per number of responses the same sampled groups cut down to it."""
    from kvpref.cli.step_inputs import load_model_and_groups, sample_evenly
    from kvpref.data import PreferenceDataset
    from kvpref.losses import as_loss
    from kvpref.training.loading.selection import check_lengths, select_groups

    loaded, dataset = load_model_and_groups(model, data, tokenizer, dtype, as_loss(loss))
    most = max(count or 1 for count in counts)
    enough = [group for group in dataset if len(group) >= most]
    if not enough:
        largest = max(map(len, dataset), default=0)
        raise InputError(f"{data}: no group has {most} responses; the largest has {largest}")
    sampled = sample_evenly(PreferenceDataset(enough, report=dataset.report), num_groups)
    datasets = {
        count: select_groups(sampled.map_groups(partial(take_responses, count=count)), as_loss(loss))
        for count in counts
    }
    check_lengths(datasets[counts[-1]], loaded)
    return loaded, datasets


def take_responses(group: Group, count: int | None) -> Group:
    """A group with `count` of its responses, spread evenly; all of them if None."""
    return group if count is None else group.take([index * len(group) // count for index in range(count)])


def _cases(
    datasets: dict[int | None, PreferenceDataset],
    variants: list[str],
    max_tokens: int | None,
    max_tokens_per_chunk: int | None,
) -> list[MemoryCase]:
    """Every variant for the first number of responses, then for the next."""
    from kvpref.cli.step_inputs import cut_micro_batches
    from kvpref.profiling.memory.step import VARIANTS, MemoryCase

    return [
        MemoryCase(
            variant=variant,
            cut=cut_micro_batches(dataset, VARIANTS[variant].mode, max_tokens),
            num_responses=count,
            max_tokens_per_chunk=max_tokens_per_chunk,
        )
        for count, dataset in datasets.items()
        for variant in variants
    ]


def _measure(
    model: PreTrainedModel,
    cases: list[MemoryCase],
    loss: PreferenceLoss | LossFunction,
    settings: dict[str, Any],
    output: Path | None,
    *,
    title: str,
) -> MemoryReport:
    import torch

    from kvpref.profiling.memory.profile import profile_cases
    from kvpref.profiling.memory.report import MemoryReport
    from kvpref.profiling.provenance import Provenance

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(model, device).train()
    profiles, skipped = profile_cases(
        model,
        cases,
        loss,
        torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True),
        snapshots=output,
        on_start=lambda name: print(f"measuring {name}", file=sys.stderr),
    )
    return MemoryReport(
        title=title,
        provenance=Provenance.collect(device),
        settings=settings,
        profiles=tuple(profiles),
        skipped=skipped,
    )


def _check_pictures() -> None:
    """Before anything is measured: can the results be drawn?"""
    from kvpref.profiling.memory.plot import require_matplotlib

    require_matplotlib()


def _show(report: MemoryReport, output: Path | None) -> None:
    from rich.console import Console

    from kvpref.profiling.memory.report import breakdown_table, peaks_table, prefix_lines

    console = Console()
    console.print(peaks_table(report))
    console.print(breakdown_table(report.largest()))
    for line in prefix_lines(report.largest()):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for name, reason in report.skipped.items():
        console.print(f"{name} was not measured: {reason}", markup=False, highlight=False, soft_wrap=True)
    if output is None or not report.profiles:
        return
    from kvpref.profiling.memory.page import write_page
    from kvpref.profiling.memory.plot import draw_report

    report.write(output / "memory.json")
    draw_report(report, output / "memory.png")
    write_page(report, output / "memory.html")
    print(f"wrote memory.html, memory.json and memory.png to {output}", file=sys.stderr)
