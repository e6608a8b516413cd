"""What `kvpref train` does once its settings are known. Imported only when a run starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvpref.cli.checkpoints import find_checkpoint
from kvpref.cli.run_config import RunConfig
from kvpref.cli.training_inputs import load_data, load_trained_model
from kvpref.cli.training_settings import training_arguments, with_defaults
from kvpref.errors import InputError, RunError
from kvpref.training import PreferenceTrainer

RUN_FILE = "run.yaml"


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
    run = with_defaults(run)
    args = training_arguments(run)
    report_main = report if args.process_index == 0 else _silent
    checkpoint = find_checkpoint(Path(args.output_dir or "."), resume=resume, report=report_main)
    loss = args.make_loss()
    model, tokenizer = load_trained_model(run, loss, args, report_main)
    train_data = load_data(run, run.data, tokenizer, loss, args, report_main)
    eval_data = None if run.eval_data is None else load_data(run, run.eval_data, tokenizer, loss, args, report_main)
    trainer = PreferenceTrainer(
        model, args, train_dataset=train_data, eval_dataset=eval_data, loss=loss, processing_class=tokenizer
    )
    if args.process_index == 0:
        run.save(Path(args.output_dir or ".") / RUN_FILE)
    metrics = _train(trainer, checkpoint, report_main)
    # Ranks leave together, and not while gloo's or NCCL's threads still hold a collective's tensors.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return metrics if args.process_index == 0 else {}


def _train(trainer: PreferenceTrainer, checkpoint: str | None, report: Callable[[str], None]) -> dict[str, Any]:
    """Train, save and evaluate."""
    args = trainer.args
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except (InputError, RunError):
        report("")  # the line of the progress bar has no end yet
        raise
    metrics = {**result.metrics, **trainer.token_meter.rates(args.world_size)}
    trainer.save_model(args.output_dir)
    report(f"saved the model to {args.output_dir}")
    if trainer.eval_dataset is not None:
        metrics.update(trainer.evaluate())
    return metrics


def _silent(line: str) -> None:
    """Only the main process speaks."""
