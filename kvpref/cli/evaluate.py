"""`kvpref eval`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvpref.atomic_files import check_writable, write_text
from kvpref.cli.given_data import GivenData
from kvpref.cli.given_settings import parse_assignments
from kvpref.cli.name_checks import known_loss
from kvpref.cli.options import (
    BF16,
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
    MODEL_PANEL,
    NUM_PROCESSES,
    ON_BAD_ROW,
    SPLIT,
    TOKENIZER,
    TRAINING_PANEL,
    TRAJECTORY_GROUPS,
    check_counts,
    of_run,
)
from kvpref.data.reading.trajectories.attempts import TrajectoryGroups
from kvpref.errors import InputError
from kvpref.ranks import own_rank


def evaluate(
    model: Annotated[str, MODEL],
    data: Annotated[list[str], DATA],
    loss: Annotated[
        str | None,
        typer.Option(
            help="One of `kvpref losses`, or yours: FILE.py:FUNCTION.",
            show_default="that of MODEL's run.yaml, else dpo",
            rich_help_panel=TRAINING_PANEL,
            callback=known_loss,
        ),
    ] = None,
    loss_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="Setting of the loss, such as beta=0.2.",
            show_default="those of kvpref losses NAME",
            rich_help_panel=TRAINING_PANEL,
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of the reference model.",
            show_default="what MODEL's run started from; an adapter's base",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    tokenizer: Annotated[str | None, TOKENIZER] = None,
    split: Annotated[str | None, SPLIT] = None,
    column: Annotated[list[str] | None, COLUMN] = None,
    group_by: Annotated[str | None, GROUP_BY] = None,
    mode: Annotated[str, MODE] = DEFAULT_MODE,
    max_tokens: Annotated[int | None, MAX_TOKENS] = None,
    dtype: Annotated[str, DTYPE] = DEFAULT_DTYPE,
    bf16: Annotated[bool | None, BF16] = None,
    max_prompt_tokens: Annotated[int | None, of_run(MAX_PROMPT_TOKENS)] = None,
    max_response_tokens: Annotated[int | None, of_run(MAX_RESPONSE_TOKENS)] = None,
    max_image_pixels: Annotated[int | None, of_run(MAX_IMAGE_PIXELS)] = None,
    on_bad_row: Annotated[str, ON_BAD_ROW] = DEFAULT_ON_BAD_ROW,
    trajectory_groups: Annotated[TrajectoryGroups, TRAJECTORY_GROUPS] = "task",
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.", show_default="none")] = None,
    num_processes: Annotated[int | None, NUM_PROCESSES] = None,
    json_: Annotated[bool, JSON] = False,
) -> None:
    """Compute loss, accuracy, margins and whatever else a loss reports of a model on data, without training.

    Losses that compare with a reference need one: --reference, or what a run's folder or an adapter's says about where
    it started from. Accuracies get 95% intervals. The figures are those of PreferenceTrainer.evaluate().

    Example: kvpref eval out pairs.jsonl --loss dpo --reference ./llama --output eval.json
    """
    given = GivenData.of(data, split=split, column=column, group_by=group_by)
    check_counts(max_tokens=max_tokens)
    settings = parse_assignments(loss_arg or [], "--loss-arg")
    if output is not None:
        if output.suffix != ".json":
            raise InputError(f"{output}: --output is a JSON file; end its name in .json")
        check_writable(output)
    from kvpref.cli.starting_ranks import end_with_starter, ranks_to_start, start_ranks, without_number

    number = ranks_to_start(num_processes, None)
    if number > 1:
        raise typer.Exit(start_ranks(number, without_number(sys.argv[1:]), output or Path(data[0])))
    end_with_starter()
    from kvpref.cli.evaluation_report import print_evaluation
    from kvpref.cli.evaluation_run import EvaluationRequest, run_evaluation
    from kvpref.data import DataOptions

    request = EvaluationRequest(
        model=model,
        data=given,
        loss=loss,
        loss_args=settings,
        reference=reference,
        tokenizer=tokenizer,
        mode=mode,
        max_tokens=max_tokens,
        dtype=dtype,
        bf16=bf16,
        data_options=DataOptions(
            max_prompt_tokens=max_prompt_tokens,
            max_response_tokens=max_response_tokens,
            max_image_pixels=max_image_pixels,
            on_bad_row=on_bad_row,  # type: ignore[arg-type]
            trajectory_groups=trajectory_groups,
        ),
        bad_rows=None if output is None else output.with_suffix(".bad_rows.jsonl"),
    )
    is_main = own_rank() == 0
    found = run_evaluation(request, lambda line: print(line, file=sys.stderr) if is_main else None)
    if not is_main:
        return
    print_evaluation(found)
    values = found.as_json()
    if output is not None:
        write_text(output, json.dumps(values, indent=2) + "\n")
        print(f"wrote {output}", file=sys.stderr)
    if json_:
        print(json.dumps(values))
