"""``--resume``: the settings of the run that an output folder holds, and what may be given beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kvpref.cli.checkpoints import RESULT_FILE
from kvpref.cli.given_settings import LOSS_ARG, Given, Settings, from_file
from kvpref.cli.resume_rules import LENGTH, is_coupled, may_be_longer, may_differ
from kvpref.cli.run_config import RUN_FILE, SOURCES, RunConfig
from kvpref.cli.run_record import RunRecord
from kvpref.cli.setting_types import read_types
from kvpref.cli.source_paths import same_sources
from kvpref.errors import InputError
from kvpref.losses import LOSSES
from kvpref.losses.user import find_loss, settings_of
from kvpref.training import PreferenceTrainingArguments

_BATCH = "per_device_train_batch_size"


def resumed_settings(given: Settings, report: Callable[[str], None]) -> Settings:
    """The settings of the run in the output folder, and over them those of `given` that do not change its results.

    Args:
        given: With their types, ``output`` among them.
        report: Takes lines for the user.

    Returns:
        `given` where there is nothing to resume.

    Raises:
        InputError: If a setting that changes results differs, or there is no run and no data to start one.
    """
    output = Path(given["output"].value)
    path = output / RUN_FILE
    if not path.exists():
        if "data" not in given:
            raise InputError(f"{output}: there is no run to resume; give MODEL and DATA to start one")
        report(f"{output} holds no run yet; starting from the beginning")
        return given
    saved = read_types(from_file(path))
    record = RunRecord.read(output)
    saved |= _for_world_size(saved, given, record, report)
    _refuse_changes(saved, given, output)
    merged = saved | given
    if "eval_steps" in given and "eval_strategy" not in given:
        merged["eval_strategy"] = Given("steps", given["eval_steps"].where)
    return merged


def _refuse_changes(saved: Settings, given: Settings, output: Path) -> None:
    values = {name: item.value for name, item in saved.items()}
    allowed = may_differ(values)
    changes = [
        name
        for name, item in given.items()
        if name not in allowed and not _equal(name, item.value, effective(values, name))
    ]
    if may_be_longer(values):
        changes = [
            name for name in changes if name not in LENGTH or not 0 < effective(values, name) < given[name].value
        ]
    if not changes:
        return
    texts = [
        f"{given[name].where} is {_shown(given[name].value)}, was {_shown(effective(values, name))}" for name in changes
    ]
    remedy = "leave it out to go on with that run, or choose another --output for a new one"
    if set(changes) <= set(LENGTH):
        first = "" if (output / RESULT_FILE).exists() else "first let this run finish (leave it out), then "
        remedy = (
            f"the learning rate was planned for the run's length; to train longer, {first}start a new run from its "
            f"model: kvpref train {output} DATA --output NEW"
        )
    raise InputError(f"{'; '.join(texts)} in {output / RUN_FILE}, which changes the results of the run; {remedy}")


def _shown(value: Any) -> str:
    """As users write it: a single source is no list."""
    return repr(value[0] if isinstance(value, list) and len(value) == 1 else value)


def _equal(name: str, one: Any, other: Any) -> bool:
    if name in SOURCES and isinstance(one, str | list) and isinstance(other, str | list):
        return same_sources(one, other)
    return bool(one == other)


def effective(values: Mapping[str, Any], name: str) -> Any:
    """What the run had: its file's value, or the default."""
    if name in values:
        return values[name]
    if name.startswith(LOSS_ARG):
        loss = values.get("loss", "dpo")
        target = LOSSES[loss] if loss in LOSSES else find_loss(loss, LOSSES)
        defaults = {item.name: item.default for item in settings_of(target)} if callable(target) else {}
        return defaults.get(name.removeprefix(LOSS_ARG))
    defaults = {item.name: item.default for kind in (PreferenceTrainingArguments, RunConfig) for item in fields(kind)}
    return defaults.get(name)


def _for_world_size(
    saved: Settings, given: Settings, record: RunRecord | None, report: Callable[[str], None]
) -> Settings:
    """The groups per process that keep the groups of a step what they were, where the number of processes changed.

    Raises:
        InputError: If no number does.
    """
    now = int(os.environ.get("WORLD_SIZE", "1"))
    if record is None or record.world_size == now:
        return {}
    values = {name: item.value for name, item in saved.items()}
    before, batch = record.world_size, effective(values, _BATCH)
    per_step = before * batch
    if per_step % now or is_coupled(values):
        raise InputError(
            f"the run was made by {before} processes, each with {batch} groups per step, and cannot go on with {now}: "
            f"its steps of {per_step} groups would be other ones; resume it with {before} processes"
        )
    if _BATCH not in given:
        report(f"{now} in place of {before} processes: {per_step // now} groups each keep the steps of {per_step}")
    return {_BATCH: Given(per_step // now, RUN_FILE)}


class CadenceCallback(TrainerCallback):
    """Lets a resumed run log, evaluate and save as its arguments say; transformers goes on as the checkpoint says."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)
