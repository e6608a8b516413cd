"""What `kvpref train` does once its settings are given. Imported only when a run starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvpref.atomic_files import check_writable
from kvpref.cli.accelerate_config import find_config, use_config
from kvpref.cli.checkpoints import RESULT_FILE, find_checkpoint, read_result, save_result
from kvpref.cli.ctrl_c import no_empty_folder
from kvpref.cli.early_checks import check_early
from kvpref.cli.early_stopping import EarlyStopping
from kvpref.cli.given_settings import Settings
from kvpref.cli.interrupts import Interrupts
from kvpref.cli.named_sources import check_sources
from kvpref.cli.overwriting import Found, delete_earlier_run, find_earlier_run
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
from kvpref.ranks import own_rank
from kvpref.training import PreferenceTrainer, PreferenceTrainingArguments


def run_training(given: Settings, *, resume: bool, overwrite: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Train as the settings say.

    Args:
        given: What the user gave.
        resume: Go on with the run in the output folder, if there is one, from its last complete checkpoint.
        overwrite: Delete the run in the output folder, once all that the new one reads is there.
        report: Takes lines for the user.

    Returns:
        The final metrics, on the main process; an empty dict on others.

    Raises:
        InputError: If a setting or the data is bad.
        RunError: If the run fails (a NaN loss, say).
    """
    is_main = own_rank() == 0  # as launchers say; the arguments know only once they are made
    report = report if is_main else _silent
    output = Path(str(given["output"].value))
    interrupts = Interrupts(output, is_main)
    with interrupts.handled(), no_empty_folder(output):
        return _run(read_types(given), interrupts, resume, overwrite, report)


def _run(
    given: Settings, interrupts: Interrupts, resume: bool, overwrite: bool, report: Callable[[str], None]
) -> dict[str, Any]:
    if (config := given.get("accelerate_config")) is not None and config.value is not None:
        given |= {"accelerate_config": replace(config, value=find_config(config.value, config.where))}
    goes_on = resume and (Path(given["output"].value) / RUN_FILE).exists()
    settings = resumed_settings(given, report) if resume else given
    run = with_defaults(RunConfig.of({name: item.value for name, item in settings.items()}))
    run.require("data", "output")
    output = Path(run.output or ".")
    if resume and (metrics := read_result(output, _length(run))) is not None:
        report(f"the run in {output} has reached its end; nothing is changed")
        return metrics if interrupts.is_main else {}
    check_sources(run.flat())  # those of the run that is resumed too
    if run.accelerate_config is not None:
        use_config(run.accelerate_config, settings["accelerate_config"].where)
    args = training_arguments(run)
    check_early(run, args, settings)
    checkpoint = find_checkpoint(output, report) if goes_on else None
    is_main = interrupts.is_main
    earlier = find_earlier_run(output) if overwrite and is_main else {}
    if is_main:
        check_writable(output / RUN_FILE)
    trainer = _make_trainer(run, args, settings, resume, earlier, report)
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
    run: RunConfig,
    args: PreferenceTrainingArguments,
    given: Settings,
    resume: bool,
    earlier: Found,
    report: Callable[[str], None],
) -> PreferenceTrainer:
    """Load everything, and write down what a resumed run needs to know."""
    output, loss = Path(args.output_dir or "."), args.make_loss()
    model, tokenizer = load_trained_model(run, loss, args, report)
    data = {
        name: (given_data, load_data(run, given_data, tokenizer, loss, args, report))
        for name, given_data in run.given_data().items()
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
    if run.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(run.early_stopping_patience))
    # Only now, when all that may be refused has been tried.
    delete_earlier_run(earlier)  # nothing on other ranks
    if args.process_index == 0:
        (output / RESULT_FILE).unlink(missing_ok=True)  # of a run that was shorter, or whose model is gone
        with_chosen(run, trainer.args).save(output / RUN_FILE)  # first: what stands beside it is a run's
        record.save(output)
        start = describe_start(trainer, run, given, memory)
        report("\n".join(start.lines))
        trainer.add_callback(TimeLeftCallback(start.step_costs, report))
    # Other ranks would find reference log-probs of the earlier run before they are deleted.
    trainer.accelerator.wait_for_everyone()
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
    trainer.token_meter.gather(args.world_size)
    metrics = {**result.metrics, **trainer.token_meter.rates(args.world_size)}
    trainer.save_with_card()
    report(f"saved the model to {args.output_dir}")
    if trainer.eval_dataset is not None:
        metrics.update(trainer.evaluate())
        trainer.create_model_card()  # with the metrics
    if args.push_to_hub:
        trainer.upload("End of training")
        report(f"pushed the model to {trainer.hub_model_id}")
    return metrics


def _silent(line: str) -> None:
    """Only the main process speaks."""
