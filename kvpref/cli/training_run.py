"""What `kvpref train` does once its settings are given. Imported only when a run starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvpref.atomic_files import check_writable
from kvpref.cli.checkpoints import RESULT_FILE, find_checkpoint, read_result, save_result
from kvpref.cli.ctrl_c import no_empty_folder
from kvpref.cli.early_checks import check_early
from kvpref.cli.given_settings import Settings
from kvpref.cli.interrupts import Interrupts
from kvpref.cli.padding import set_pad_token
from kvpref.cli.resume_rules import LENGTH
from kvpref.cli.resuming import CadenceCallback, resumed_settings
from kvpref.cli.run_config import RUN_FILE, RunConfig
from kvpref.cli.run_record import RunRecord
from kvpref.cli.setting_types import read_types
from kvpref.cli.start_block import describe_start
from kvpref.cli.time_left import TimeLeftCallback
from kvpref.cli.token_budget import choose_budget
from kvpref.cli.training_inputs import load_data, load_trained_model
from kvpref.cli.training_settings import training_arguments, with_chosen, with_defaults
from kvpref.errors import InputError, Interrupted, RunError
from kvpref.training import PreferenceTrainer, PreferenceTrainingArguments


def run_training(given: Settings, *, resume: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Train as the settings say.

    Args:
        given: What the user gave.
        resume: Go on with the run in the output folder, if there is one, from its last complete checkpoint.
        report: Takes lines for the user.

    Returns:
        The final metrics, on the main process; an empty dict on others.

    Raises:
        InputError: If a setting or the data is bad, or the output folder holds another run.
        RunError: If the run fails (a NaN loss, say).
    """
    is_main = os.environ.get("RANK", "0") == "0"  # as launchers say; the arguments know only once they are made
    report = report if is_main else _silent
    output = Path(str(given["output"].value))
    interrupts = Interrupts(output, is_main)
    with interrupts.handled(), no_empty_folder(output):
        return _run(read_types(given), interrupts, resume, report)


def _run(given: Settings, interrupts: Interrupts, resume: bool, report: Callable[[str], None]) -> dict[str, Any]:
    settings = resumed_settings(given, report) if resume else given
    run = with_defaults(RunConfig.of({name: item.value for name, item in settings.items()}))
    run.require("data", "output")
    output = Path(run.output or ".")
    if resume and (metrics := read_result(output, _length(run))) is not None:
        report(f"the run in {output} has reached its end; nothing is changed")
        return metrics if interrupts.is_main else {}
    args = training_arguments(run)
    check_early(run, args, settings)
    checkpoint = find_checkpoint(output, resume=resume, report=report)
    is_main = interrupts.is_main
    if is_main:
        check_writable(output / RUN_FILE)
    trainer = _make_trainer(run, args, settings, resume, report)
    trainer.add_callback(interrupts.callback)
    metrics = _train(trainer, checkpoint, interrupts, report)
    if is_main:
        save_result(output, metrics, _length(run))
    # Ranks leave together, and not while gloo's or NCCL's threads still hold a collective's tensors.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return metrics if is_main else {}


def _length(run: RunConfig) -> dict[str, Any]:
    """What says how many steps a run has, for one set of data."""
    return {name: run.training.get(name) for name in LENGTH}


def _make_trainer(
    run: RunConfig, args: PreferenceTrainingArguments, given: Settings, resume: bool, report: Callable[[str], None]
) -> PreferenceTrainer:
    """Load everything, and write down what a resumed run needs to know."""
    output, loss = Path(args.output_dir or "."), args.make_loss()
    model, tokenizer = load_trained_model(run, loss, args, report)
    data = {
        name: (source, load_data(run, source, tokenizer, loss, args, report))
        for name, source in (("data", run.data), ("eval_data", run.eval_data))
        if source is not None
    }
    record = RunRecord.of(args.world_size, tokenizer, data)
    before = RunRecord.read(output) if resume else None
    if before is not None:
        before.check_unchanged(record, output, tokenizer, data)
        record = replace(record, day=before.day)
    if loss.reads == "ends":
        set_pad_token(model, tokenizer, [groups for _, groups in data.values()], report)
    memory = choose_budget(model, run, args, loss, data["data"][1])
    trainer = PreferenceTrainer(
        model,
        args,
        data["data"][1],
        data["eval_data"][1] if "eval_data" in data else None,
        loss=loss,
        processing_class=tokenizer,
        callbacks=[CadenceCallback()],
    )
    if args.process_index == 0:
        (output / RESULT_FILE).unlink(missing_ok=True)  # of a run that was shorter, or whose model is gone
        record.save(output)
        with_chosen(run, trainer.args).save(output / RUN_FILE)
        start = describe_start(trainer, run, given, memory)
        report("\n".join(start.lines))
        trainer.add_callback(TimeLeftCallback(start.step_costs, report))
    return trainer


def _train(
    trainer: PreferenceTrainer, checkpoint: str | None, interrupts: Interrupts, report: Callable[[str], None]
) -> dict[str, Any]:
    """Train, save and evaluate."""
    args = trainer.args
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except (InputError, RunError, Interrupted):
        report("")  # the line of the progress bar has no end yet
        raise
    interrupts.check()
    metrics = {**result.metrics, **trainer.token_meter.rates(args.world_size)}
    trainer.save_model(args.output_dir)
    report(f"saved the model to {args.output_dir}")
    if trainer.eval_dataset is not None:
        metrics.update(trainer.evaluate())
    return metrics


def _silent(line: str) -> None:
    """Only the main process speaks."""
