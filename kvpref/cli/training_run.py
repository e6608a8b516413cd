"""What `kvpref train` does once its settings are known. Imported only when a run starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpref.cli.adapters import add_lora, is_adapter
from kvpref.cli.loading import load_matching_tokenizer, load_model, set_pad_token
from kvpref.cli.run_config import RunConfig
from kvpref.data import DataOptions, PreferenceDataset, load_preferences
from kvpref.errors import InputError, RunError
from kvpref.losses import PreferenceLoss
from kvpref.modeling.value_head import add_value_head, holds_value_head
from kvpref.training import PreferenceTrainer, PreferenceTrainingArguments

RUN_FILE = "run.yaml"
BAD_ROWS_FILE = "bad_rows.jsonl"
_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")

# What a user of this command expects where transformers' own default differs.
_DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "max_tokens_per_micro_batch": 16384,
    "logging_steps": 10,
    "save_steps": 200,
    "save_total_limit": 2,
}


def run_training(run: RunConfig, *, resume: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Train as `run` says.

    Args:
        run: The settings.
        resume: Go on from the last complete checkpoint in the output folder, if there is one.
        report: Takes lines for the user.

    Returns:
        The final metrics, on the main process; an empty dict on others.

    Raises:
        InputError: If a setting or the data is bad, or the output folder holds another run.
        RunError: If the run fails (a NaN loss, say).
    """
    args = training_arguments(run)
    report_main = report if args.process_index == 0 else _silent
    checkpoint = find_checkpoint(Path(args.output_dir or "."), resume=resume, report=report_main)
    loss = args.make_loss()
    model, tokenizer = _load_model(run, loss, args, report_main)
    train_data = _load(run, run.data, tokenizer, loss, args, report_main)
    eval_data = None if run.eval_data is None else _load(run, run.eval_data, tokenizer, loss, args, report_main)
    trainer = PreferenceTrainer(
        model, args, train_dataset=train_data, eval_dataset=eval_data, loss=loss, processing_class=tokenizer
    )
    if args.process_index == 0:
        run.save(Path(args.output_dir or ".") / RUN_FILE)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except (InputError, RunError):
        report_main("")  # the line of the progress bar has no end yet
        raise
    metrics = {**result.metrics, **trainer.token_meter.rates(args.world_size)}
    trainer.save_model(args.output_dir)
    report_main(f"saved the model to {args.output_dir}")
    if eval_data is not None:
        metrics.update(trainer.evaluate())
    # Ranks leave together, and not while gloo's or NCCL's threads still hold a collective's tensors.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return metrics if args.process_index == 0 else {}


def training_arguments(run: RunConfig) -> PreferenceTrainingArguments:
    """The trainer's arguments for a run.

    Raises:
        InputError: If there is no such argument, or its value is refused.
    """
    given = {**_DEFAULTS, **run.training, "output_dir": run.output}
    valid = {item.name for item in fields(PreferenceTrainingArguments) if item.init}
    unknown = sorted(set(given) - valid)
    if unknown:
        raise InputError(f"there is no training argument {unknown[0]!r}; see PreferenceTrainingArguments")
    try:
        return PreferenceTrainingArguments(**given)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"training arguments: {error}") from error


def find_checkpoint(output: Path, *, resume: bool, report: Callable[[str], None]) -> str | None:
    """The last complete checkpoint to resume from, or None to start anew.

    A checkpoint is complete once its trainer state, which is written last, can be read: a run may have been killed
    while saving.

    Raises:
        InputError: If the folder holds checkpoints and the run is not to be resumed; nothing saved is overwritten.
    """
    folders = sorted(output.glob("checkpoint-*"), key=lambda path: _step_of(path.name), reverse=True)
    if not resume:
        if folders or any((output / name).exists() for name in _MODEL_FILES):
            raise InputError(
                f"{output}: holds an earlier run; pass --resume to go on with it, or choose another --output"
            )
        return None
    for folder in folders:
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            report(f"{folder.name} is incomplete and is passed over")
            continue
        report(f"resuming from {folder.name}")
        return str(folder)
    report("no complete checkpoint to resume from; starting from the beginning")
    return None


def _load_model(
    run: RunConfig, loss: PreferenceLoss, args: PreferenceTrainingArguments, report: Callable[[str], None]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with the heads and the adapter that the run asks for, and its tokenizer."""
    model = load_model(
        run.model, run.config, dtype=run.dtype, seed=args.seed, reads=loss.reads, may_add_head=loss.reads == "ends"
    )
    tokenizer = load_matching_tokenizer(run.tokenizer, run.model, model)
    if loss.reads == "ends":
        set_pad_token(model, tokenizer, report)
    if loss.head.values:
        source = run.model
        if source is not None and is_adapter(source):
            raise InputError(
                f"{source}: an adapter cannot be trained further with a loss that reads values, since its base model "
                "has no value head; merge it into the base model first"
            )
        add_value_head(model, source if source is not None and holds_value_head(source) else None)
    if run.lora_r is not None:
        model = add_lora(model, run, loss)
    return model, tokenizer


def _step_of(name: str) -> int:
    suffix = name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1


def _load(
    run: RunConfig,
    source: str | None,
    tokenizer: Any,
    loss: PreferenceLoss,
    args: PreferenceTrainingArguments,
    report: Callable[[str], None],
) -> PreferenceDataset:
    assert source is not None
    options = DataOptions(
        max_prompt_tokens=run.max_prompt_tokens,
        max_response_tokens=run.max_response_tokens,
        on_bad_row=run.on_bad_row,  # type: ignore[arg-type]
        columns=loss.columns,
    )
    groups = load_preferences(source, tokenizer, options)
    found = groups.report
    assert found is not None
    report(
        f"{source}: {len(groups)} groups; {len(found.bad_rows)} bad rows skipped; "
        f"{found.num_truncated_prompts} prompts and {found.num_truncated_responses} responses cut"
    )
    if found.bad_rows and args.process_index == 0:
        path = Path(args.output_dir or ".") / f"{Path(source).stem}.{BAD_ROWS_FILE}"
        path.parent.mkdir(parents=True, exist_ok=True)
        found.write_bad_rows(path)
        report(f"bad rows are listed in {path}")
    return groups


def _silent(line: str) -> None:
    """Only the main process speaks."""
