"""`kvpref score`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpref.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvpref.data import PreferenceDataset

_WRITERS = (".jsonl", ".parquet")


def score(
    model: Annotated[str, typer.Argument(help="Folder or hub name.")],
    data: Annotated[str, typer.Argument(help=".jsonl, .json, .parquet or dataset name.")],
    output: Annotated[Path, typer.Option(help="File to write: .jsonl or .parquet.")],
    tokenizer: Annotated[str | None, typer.Option(help="Default: the model's own.")] = None,
    mode: Annotated[str, typer.Option(help="two_pass, one_pass, packed, padded.")] = "two_pass",
    max_tokens: Annotated[int, typer.Option(help="Token budget of a batch.")] = 16384,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, auto.")] = "auto",
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Keep the end of longer prompts.")] = None,
    max_response_tokens: Annotated[int | None, typer.Option(help="Keep the start of longer responses.")] = None,
    on_bad_row: Annotated[str, typer.Option(help="stop or skip.")] = "stop",
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on the last line of stdout.")] = False,
) -> None:
    """Write the log-prob of every response under a model.

    Each row has `id` (where the group came from), `response` (its number), `num_tokens`, `sum_logp` and `mean_logp`.

    Example: kvpref score ./llama groups.jsonl --output scores.jsonl
    """
    if output.suffix not in _WRITERS:
        raise InputError(f"{output}: unknown output format; end the name in {' or '.join(_WRITERS)}")
    import kvpref
    from kvpref.cli.loading import load_matching_tokenizer, load_model
    from kvpref.data import DataOptions, load_preferences
    from kvpref.plans import MODES

    if mode not in MODES:
        raise InputError(f"unknown mode {mode!r}; choose from: {', '.join(MODES)}")
    loaded = kvpref.attach(load_model(model, None, dtype=dtype)).eval()
    options = DataOptions(
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        on_bad_row=on_bad_row,  # type: ignore[arg-type]
    )
    groups = load_preferences(data, load_matching_tokenizer(tokenizer, model, loaded), options)
    rows = sorted(_scores(loaded, groups, mode, max_tokens), key=lambda row: (row["group"], row["response"]))
    _write(rows, output)
    print(f"wrote {len(rows)} log-probs of {len(groups)} groups to {output}", file=sys.stderr)
    if groups.report is not None and groups.report.bad_rows:
        listed = output.with_suffix(".bad_rows.jsonl")
        groups.report.write_bad_rows(listed)
        print(f"skipped {len(groups.report.bad_rows)} bad rows, listed in {listed}", file=sys.stderr)
    if json_:
        print(json.dumps({"output": str(output), "num_sequences": len(rows), "num_groups": len(groups)}))


def _scores(model: PreTrainedModel, groups: PreferenceDataset, mode: str, max_tokens: int) -> Iterator[dict[str, Any]]:
    """One row per response, in the order in which batches run."""
    import torch
    from rich.progress import track

    import kvpref
    from kvpref.data import StepOptions, StepPlanner

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(model, device)
    planner = StepPlanner(
        groups.lengths,
        StepOptions(
            groups_per_step=len(groups),
            max_tokens_per_micro_batch=max_tokens,
            mode=mode,  # type: ignore[arg-type]
            shuffle=False,
        ),
        groups.group_ids,
    )
    micro_batches = planner.steps()[0][0]
    for micro_batch in track(micro_batches, description="scoring", console=_stderr_console()):
        batch = kvpref.collate([groups[index] for index in micro_batch.group_indices], device=device)
        with torch.no_grad():
            logps = kvpref.response_logps(model, batch, mode=mode)
        values = zip(logps.group_index.tolist(), logps.lengths().tolist(), logps.sum().tolist(), strict=True)
        seen: dict[int, int] = {}
        for position, num_tokens, total in values:
            index = micro_batch.group_indices[position]
            seen[index] = seen.get(index, -1) + 1
            yield {
                "group": index,
                "id": groups[index].id,
                "response": seen[index],
                "num_tokens": num_tokens,
                "sum_logp": total,
                "mean_logp": total / max(1, num_tokens),
            }


def _stderr_console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _write(rows: list[dict[str, Any]], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), output)
    else:
        output.write_text("".join(json.dumps(row) + "\n" for row in rows))
