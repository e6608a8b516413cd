"""The model, the tokenizer and the data of a training run. Imported only when one starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from kvpref.cli.adapters import add_lora, is_adapter
from kvpref.cli.given_data import GivenData
from kvpref.cli.loading import load_matching_processor, load_model
from kvpref.cli.run_config import RunConfig
from kvpref.data import DataOptions, PreferenceDataset
from kvpref.errors import InputError
from kvpref.losses import PreferenceLoss
from kvpref.models.partitioned import has_partitioned
from kvpref.models.value_head import add_value_head, holds_value_head
from kvpref.training import PreferenceTrainingArguments

BAD_ROWS_FILE = "bad_rows.jsonl"


def load_trained_model(
    run: RunConfig, loss: PreferenceLoss, args: PreferenceTrainingArguments, report: Callable[[str], None]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """The model with the heads and the adapter that the run asks for, and its tokenizer or processor."""
    model = load_model(
        run.model,
        run.model_config,
        dtype=run.dtype,
        seed=args.seed,
        reads=loss.reads,
        may_add_head=loss.reads == "ends",
    )
    tokenizer = load_matching_processor(run.tokenizer, run.model, model)
    if loss.head.values:
        source = run.model
        if source is not None and is_adapter(source):
            raise InputError(
                f"{source}: an adapter cannot be trained further with a loss that reads values, since its base model "
                "has no value head; merge it into the base model first"
            )
        add_value_head(model, source if source is not None and holds_value_head(source) else None)
    if run.lora_r is not None:
        if has_partitioned(model):
            torch.manual_seed(
                args.seed
            )  # ZeRO-3 makes random weights on one rank, which leaves ranks in different states
        model = add_lora(model, run, loss)
    return model, tokenizer


def load_data(
    run: RunConfig,
    given: GivenData,
    tokenizer: Any,
    loss: PreferenceLoss,
    args: PreferenceTrainingArguments,
    report: Callable[[str], None],
) -> PreferenceDataset:
    options = DataOptions(
        max_prompt_tokens=run.max_prompt_tokens,
        max_response_tokens=run.max_response_tokens,
        max_image_pixels=run.max_image_pixels,
        on_bad_row=run.on_bad_row,  # type: ignore[arg-type]
        trajectory_groups=run.trajectory_groups,
        trajectory_pairs=loss.reads_pairs,
        columns=loss.columns,
        seed=args.seed,
    )
    groups = given.load(tokenizer, options)
    found = groups.report
    assert found is not None
    for line in found.lines():
        report(line)
    if found.bad_rows and args.process_index == 0:
        path = Path(args.output_dir or ".") / f"{given.stem}.{BAD_ROWS_FILE}"
        path.parent.mkdir(parents=True, exist_ok=True)
        found.write_bad_rows(path)
        report(f"bad rows are listed in {path}")
    return groups
