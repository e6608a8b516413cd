"""Finds, before a model is loaded, what would stop a run late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from kvpref.cli.given_settings import Settings, option_name
from kvpref.cli.run_config import RunConfig
from kvpref.errors import InputError
from kvpref.training import PreferenceTrainingArguments
from kvpref.training.hub import check_hub

_NEEDS_EVAL_DATA: dict[str, Callable[[Any], bool]] = {
    "eval_steps": lambda value: value is not None,
    "eval_strategy": lambda value: value != "no",
    "load_best_model_at_end": bool,
    "eval_on_start": bool,
    "do_eval": bool,
}
"""Settings that make no sense without evaluation data, and for which values."""

_READ_THE_MODEL = ("galore", "apollo", "lomo")
"""Optimizers that transformers can make only with the model."""

_EXTRAS = frozenset({"tensorboard", "trackio", "wandb"})
"""What metrics are reported to for which kvpref has an extra, of the same name."""


def check_early(run: RunConfig, args: PreferenceTrainingArguments, given: Settings) -> None:
    """Raise InputError for settings that transformers would refuse only once model and data are loaded.

    Args:
        run: The whole run.
        args: The arguments made from it.
        given: Where settings were given, for messages.
    """
    if run.eval_data is None:
        for name, means_evaluation in _NEEDS_EVAL_DATA.items():
            if name in given and means_evaluation(given[name].value):
                raise InputError(f"{given[name].where}: there is no data to evaluate on; give --eval-data")
    _check_reports(args, _where(given, "report_to"))
    if args.push_to_hub and args.process_index == 0:
        check_hub(args.hub_token, _where(given, "push_to_hub"))
    if args.dataloader_persistent_workers and args.dataloader_num_workers == 0:
        raise InputError(
            f"{_where(given, 'dataloader_persistent_workers')}: needs data workers; set dataloader_num_workers"
        )
    _check_optimizer(args, _where_any(given, "optim_args", "optim"))
    _check_schedule(args, _where(given, "lr_scheduler_kwargs"))


def _where(given: Settings, name: str) -> str:
    return given[name].where if name in given else option_name(name)


def _where_any(given: Settings, *names: str) -> str:
    """Where the first given one of these settings comes from, or the last."""
    return _where(given, next((name for name in names if name in given), names[-1]))


def _check_reports(args: PreferenceTrainingArguments, where: str) -> None:
    names = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(
                f"{where}: expected none, all, or some of {', '.join(INTEGRATION_TO_CALLBACK)}; got {name!r}"
            )
        if name != "flyte" and name not in get_available_reporting_integrations():
            how = f'pip install "kvpref[{name}]"' if name in _EXTRAS else "install it"
            raise InputError(f"{where}: the package for {name!r} is not installed; {how}, or choose none")


def _check_optimizer(args: PreferenceTrainingArguments, where: str) -> None:
    if any(part in str(args.optim) for part in _READ_THE_MODEL):
        return
    weights = [torch.nn.Parameter(torch.zeros(1))]
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        if settings.get("lr", 0.0) is None:  # chosen later, by loss and model
            settings = {**settings, "lr": 0.0}
        kind(weights, **settings)
    except (ImportError, ValueError, TypeError) as error:
        raise InputError(f"{where}: {' '.join(str(error).split())}") from error


def _check_schedule(args: PreferenceTrainingArguments, where: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate or 0.0)
    num_steps = args.max_steps if args.max_steps > 0 else 1000
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
        )
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{where}: {SchedulerType(args.lr_scheduler_type).value} cannot be made with it: {reason}"
        ) from error
