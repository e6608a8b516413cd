"""`kvpref score`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpref.atomic_files import check_writable, replacing, write_text
from kvpref.cli.given_data import GivenData
from kvpref.cli.options import (
    COLUMN,
    DATA,
    DEFAULT_DTYPE,
    DEFAULT_MODE,
    DEFAULT_ON_BAD_ROW,
    DTYPE,
    GROUP_BY,
    JSON,
    MAX_IMAGE_PIXELS,
    MAX_PROMPT_TOKENS,
    MAX_RESPONSE_TOKENS,
    MAX_TOKENS,
    MODE,
    MODEL,
    ON_BAD_ROW,
    SPLIT,
    TOKENIZER,
    TRAJECTORY_GROUPS,
    check_counts,
)
from kvpref.data.reading.trajectories.attempts import TrajectoryGroups
from kvpref.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvpref.data import PreferenceDataset
    from kvpref.plan.batch import Batch

Row = dict[str, Any]
_WRITERS = (".jsonl", ".parquet")


def score(
    model: Annotated[str, MODEL],
    data: Annotated[list[str], DATA],
    output: Annotated[Path, typer.Option(help="File to write: .jsonl or .parquet.")],
    reward_model: Annotated[
        bool, typer.Option("--reward-model", help="MODEL has a scalar head: write rewards instead of log-probs.")
    ] = False,
    tokenizer: Annotated[str | None, TOKENIZER] = None,
    split: Annotated[str | None, SPLIT] = None,
    column: Annotated[list[str] | None, COLUMN] = None,
    group_by: Annotated[str | None, GROUP_BY] = None,
    mode: Annotated[str, MODE] = DEFAULT_MODE,
    max_tokens: Annotated[int | None, MAX_TOKENS] = None,
    dtype: Annotated[str, DTYPE] = DEFAULT_DTYPE,
    max_prompt_tokens: Annotated[int | None, MAX_PROMPT_TOKENS] = None,
    max_response_tokens: Annotated[int | None, MAX_RESPONSE_TOKENS] = None,
    max_image_pixels: Annotated[int | None, MAX_IMAGE_PIXELS] = None,
    on_bad_row: Annotated[str, ON_BAD_ROW] = DEFAULT_ON_BAD_ROW,
    trajectory_groups: Annotated[TrajectoryGroups, TRAJECTORY_GROUPS] = "task",
    json_: Annotated[bool, JSON] = False,
) -> None:
    """Write the log-prob, or with --reward-model the reward, of every response under a model.

    Each row has `id` (where the group came from), `response` (its number), and `num_tokens`, `sum_logp` and
    `mean_logp`; or `reward`, and `score` where the data has scores or labels. Where it has, rewards are also compared
    with them: pair accuracy, and the score of each prompt's best response by reward beside their mean.

    Example: kvpref score ./llama groups.jsonl --output scores.jsonl
    """
    given = GivenData.of(data, split=split, column=column, group_by=group_by)
    check_counts(max_tokens=max_tokens)
    if output.suffix not in _WRITERS:
        raise InputError(f"{output}: unknown output format; end the name in {' or '.join(_WRITERS)}")
    check_writable(output)
    import kvpref
    from kvpref.cli.loading import load_matching_processor, load_model
    from kvpref.data import DataOptions
    from kvpref.plan.modes import MODES
    from kvpref.training.loading.selection import check_lengths

    if mode not in MODES:
        raise InputError(f"unknown mode {mode!r}; choose from: {', '.join(MODES)}")
    reads = "ends" if reward_model else "tokens"
    loaded = kvpref.attach(load_model(model, None, dtype=dtype, reads=reads), padded_only=mode == "padded").eval()
    options = DataOptions(
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        max_image_pixels=max_image_pixels,
        on_bad_row=on_bad_row,  # type: ignore[arg-type]
        trajectory_groups=trajectory_groups,
    )
    groups = given.load(load_matching_processor(tokenizer, model, loaded), options)
    if groups.report is not None:
        for line in groups.report.lines():
            print(line, file=sys.stderr)
    check_lengths(groups, loaded)
    measure = _rewards if reward_model else _logps
    rows = sorted(_score(loaded, groups, mode, max_tokens, measure), key=lambda row: (row["group"], row["response"]))
    if all(row.get("score") is None for row in rows):
        for row in rows:
            row.pop("score", None)
    _write(rows, output)
    what = "rewards" if reward_model else "log-probs"
    print(f"wrote {len(rows)} {what} of {len(groups)} groups to {output}", file=sys.stderr)
    if groups.report is not None and groups.report.bad_rows:
        listed = output.with_suffix(".bad_rows.jsonl")
        groups.report.write_bad_rows(listed)
        print(f"skipped {len(groups.report.bad_rows)} bad rows, listed in {listed}", file=sys.stderr)
    quality = _report_quality(rows) if reward_model else {}
    if json_:
        print(json.dumps({"output": str(output), "num_sequences": len(rows), "num_groups": len(groups), **quality}))


def _score(
    model: PreTrainedModel,
    groups: PreferenceDataset,
    mode: str,
    max_tokens: int | None,
    measure: Callable[[PreTrainedModel, Batch, str], list[Row]],
) -> Iterator[Row]:
    """One row per response, in the order in which batches run; `measure` gives what belongs to each sequence."""
    import torch
    from rich.console import Console
    from rich.progress import track

    import kvpref
    from kvpref.data import StepBatcher, StepOptions
    from kvpref.data.batching.budgets import default_budget
    from kvpref.plan.sharing import DEFAULT_MIN_SHARED_TOKENS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(model, device)
    lengths = groups.batching_lengths(DEFAULT_MIN_SHARED_TOKENS)
    options = StepOptions(
        groups_per_step=len(groups),
        max_tokens_per_micro_batch=default_budget(lengths, mode) if max_tokens is None else max_tokens,
        mode=mode,  # type: ignore[arg-type]
        shuffle=False,
    )
    micro_batches = StepBatcher(lengths, options, groups.group_ids).steps()[0][0]
    for micro_batch in track(micro_batches, description="scoring", console=Console(stderr=True)):
        batch = kvpref.collate([groups[index] for index in micro_batch.group_indices], device=device)
        with torch.no_grad():
            measured = iter(measure(model, batch, mode))
        for index, group in zip(micro_batch.group_indices, batch.groups, strict=True):
            for response in range(len(group)):
                yield {"group": index, "id": group.id, "response": response, **next(measured)}


def _logps(model: PreTrainedModel, batch: Batch, mode: str) -> list[Row]:
    import kvpref

    logps = kvpref.response_logps(model, batch, mode=mode)
    found = (logps.lengths(), logps.sum(), logps.mean())
    return [
        {"num_tokens": num_tokens, "sum_logp": total, "mean_logp": mean}
        for num_tokens, total, mean in zip(*(values.tolist() for values in found), strict=True)
    ]


def _rewards(model: PreTrainedModel, batch: Batch, mode: str) -> list[Row]:
    import kvpref
    from kvpref.data.reward_quality import known_scores

    rewards = kvpref.response_rewards(model, batch, mode=mode).rewards.tolist()
    scores = [score for group in batch.groups for score in known_scores(group)]
    return [{"reward": reward, "score": score} for reward, score in zip(rewards, scores, strict=True)]


def _report_quality(rows: list[Row]) -> Row:
    """Say how well the rewards order the responses, where the data has scores."""
    from kvpref.data.reward_quality import measure_rewards

    by_group = [list(group) for _, group in groupby(rows, key=lambda row: row["group"])]
    quality = measure_rewards(
        ([row["reward"] for row in group], [row.get("score") for row in group]) for group in by_group
    )
    if quality.pair_accuracy is not None:
        print(f"pair accuracy {quality.pair_accuracy:.1%} over {quality.num_pairs} pairs with different scores")
    if quality.best_of_n_score is not None:
        print(
            f"score of the response with the highest reward {quality.best_of_n_score:.4f}, of one at random "
            f"{quality.mean_score:.4f}, of the best {quality.oracle_score:.4f} ({quality.num_groups} groups)"
        )
    return asdict(quality) if quality.num_groups else {}


def _write(rows: list[Row], output: Path) -> None:
    if output.suffix == ".jsonl":
        write_text(output, "".join(json.dumps(row) + "\n" for row in rows))
        return
    import pyarrow
    import pyarrow.parquet

    with replacing(output) as partial:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), partial)
