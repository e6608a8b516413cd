"""``--early-stopping-patience``: what it needs, and a count that survives a resume. Imported only when a run starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from kvpref.cli.run_config import RunConfig
from kvpref.errors import InputError

_OPTION = "--early-stopping-patience"


def with_early_stopping(run: RunConfig) -> RunConfig:
    """`run` with what early stopping needs where nothing was given: the best model by ``eval_loss``, which is saved.

    Raises:
        InputError: If there are no evaluations, or settings say that the best model is not kept.
    """
    if run.early_stopping_patience is None:
        return run
    training = dict(run.training)
    if run.eval_data is None:
        raise InputError(f"{_OPTION}: there is no data to evaluate on; give --eval-data")
    strategy = training.get("eval_strategy", "no" if training.get("eval_steps") is None else "steps")
    if strategy == "no":
        raise InputError(f"{_OPTION}: counts evaluations during training; give --eval-steps")
    if training.setdefault("load_best_model_at_end", True) is not True:
        raise InputError(f"{_OPTION}: keeps the best model; leave load_best_model_at_end out")
    training.setdefault("metric_for_best_model", "eval_loss")
    training.setdefault("eval_strategy", strategy)
    training.setdefault("save_strategy", strategy)
    if strategy == "steps" and training.get("eval_steps") is not None:
        training.setdefault("save_steps", training["eval_steps"])
    return replace(run, training=training)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, which goes on counting where the checkpoint of a resumed run left off."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        callbacks: Any = state.stateful_callbacks or {}  # a mapping by now, whatever transformers declares
        saved = callbacks.get(type(self).__name__)
        if state.global_step and saved is not None:
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
