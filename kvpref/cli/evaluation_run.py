"""What `kvpref eval` does once its options are read. Imported only when an evaluation starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from kvpref.cli.adapters import is_adapter
from kvpref.cli.evaluation_references import PastRun, ReferenceSource, choose_reference, find_run
from kvpref.cli.evaluation_report import Evaluation
from kvpref.cli.given_data import GivenData
from kvpref.cli.given_settings import LOSS_ARG, Given
from kvpref.cli.loading import load_matching_processor, load_model
from kvpref.cli.options import DEFAULT_LOSS
from kvpref.cli.run_config import RunConfig
from kvpref.cli.setting_types import read_types
from kvpref.cli.training_settings import training_arguments, with_defaults
from kvpref.data import DataOptions, PreferenceDataset
from kvpref.errors import InputError
from kvpref.losses import PreferenceLoss, registered_name
from kvpref.models.value_head import add_value_head, holds_value_head
from kvpref.training import PreferenceTrainer, PreferenceTrainingArguments

_GROUPS_PER_STEP = 64
"""Groups that are planned together, so that micro-batches are full."""

_LIMITS = ("max_prompt_tokens", "max_response_tokens", "max_image_pixels")
"""Settings of the run that cut its sequences."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What the user asked for; see the options of `kvpref eval`."""

    model: str
    """Folder or hub name."""

    data: GivenData
    """As the command line names it."""

    loss: str | None
    """None for that of the run that made the model, or dpo."""

    loss_args: Mapping[str, Any]
    """Settings of the loss, over those of the run if `loss` is None."""

    reference: str | None
    """Folder or hub name of the model to compare with."""

    tokenizer: str | None
    """Folder or hub name; None for the model's own."""

    mode: str
    """How batches run."""

    max_tokens: int | None
    """Token budget of a micro-batch; None for the default."""

    dtype: str
    """Of the weights."""

    bf16: bool | None
    """Autocast; None for where the GPU has it."""

    data_options: DataOptions
    """How rows are read; the columns are the loss's."""

    bad_rows: Path | None
    """Where rows that were skipped are listed."""


def run_evaluation(request: EvaluationRequest, report: Callable[[str], None]) -> Evaluation:
    """Evaluate as asked; on several processes each has a part of the data, and all get the same figures.

    Args:
        request: What the user asked for.
        report: Takes lines for the user.

    Raises:
        InputError: If something does not fit, or a reference is needed and none is known.
    """
    run = find_run(request.model)
    with TemporaryDirectory(prefix="kvpref-eval-") as folder:
        args, loss = _arguments(request, run, folder)
        source = _reference(request, run, loss)
        model = _load(request.model, loss, request.dtype)
        tokenizer = load_matching_processor(request.tokenizer, request.model, model)
        groups = _load_data(request, run, tokenizer, loss, args, report)
        if source is not None and source.model is None:
            args.reference = "base"
        reference = None
        if source is not None and source.model is not None:
            report(f"reference: {source.description}")
            reference = load_model(source.model, None, dtype=request.dtype)
        trainer = PreferenceTrainer(
            model, args, eval_dataset=groups, loss=loss, reference_model=reference, processing_class=tokenizer
        )
        metrics = trainer.evaluate()
        found = _describe(request, trainer, groups, source, metrics)
        # As after training: ranks leave together.
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
    return found


def _arguments(
    request: EvaluationRequest, run: PastRun | None, folder: str
) -> tuple[PreferenceTrainingArguments, PreferenceLoss]:
    """The trainer's arguments and the loss: as given, else as the run had it."""
    name, loss_args = request.loss, dict(request.loss_args)
    if name is None and run is not None:
        name = run.config.training.get("loss")
        loss_args = {**(run.config.training.get("loss_args") or {}), **loss_args}
    given = {LOSS_ARG + key: Given(value, f"--loss-arg {key}") for key, value in loss_args.items()}
    given["loss"] = Given(DEFAULT_LOSS if name is None else name, "--loss")
    chosen: dict[str, Any] = {key: item.value for key, item in read_types(given).items()}
    if request.max_tokens is not None:
        chosen["max_tokens_per_micro_batch"] = request.max_tokens
    if request.bf16 is not None:
        chosen["bf16"] = request.bf16
    settings = RunConfig.of(
        {
            **chosen,
            "output": folder,
            "dtype": request.dtype,
            "mode": request.mode,
            "precompute_reference": False,  # each batch is read once: nothing is gained by storing
            "learning_rate": 0.0,
            "save_strategy": "no",
        }
    )
    args = training_arguments(with_defaults(settings))
    loss = args.make_loss()
    # The figures of losses that couple groups depend on which ones are together: as in training's evaluations.
    if not loss.couples_groups:
        args.per_device_eval_batch_size = _GROUPS_PER_STEP
    return args, loss


def _reference(request: EvaluationRequest, run: PastRun | None, loss: PreferenceLoss) -> ReferenceSource | None:
    name = registered_name(loss)
    if not loss.needs_reference:
        if request.reference is not None:
            raise InputError(f"--reference: loss {name!r} reads no reference; leave it out")
        return None
    return choose_reference(request.model, request.reference, run, name)


def _load(source: str, loss: PreferenceLoss, dtype: str) -> PreTrainedModel:
    model = load_model(source, None, dtype=dtype, reads=loss.reads)
    if loss.head.values:
        if is_adapter(source) or not holds_value_head(source):
            raise InputError(
                f"{source}: loss {registered_name(loss)!r} reads values, and this folder holds no model with a value "
                "head; give one that was trained with this loss"
            )
        add_value_head(model, source)
    # Nothing is trained; with an adapter that also says that switching it off gives the base model back.
    return model.requires_grad_(False)


def _load_data(
    request: EvaluationRequest,
    run: PastRun | None,
    tokenizer: Any,
    loss: PreferenceLoss,
    args: PreferenceTrainingArguments,
    report: Callable[[str], None],
) -> PreferenceDataset:
    options = replace(request.data_options, columns=loss.columns, trajectory_pairs=loss.reads_pairs)
    options = _with_limits(options, run, report)
    groups = request.data.load(tokenizer, options)
    found = groups.report
    assert found is not None
    for line in found.lines():
        report(line)
    if found.bad_rows and request.bad_rows is not None and args.process_index == 0:
        found.write_bad_rows(request.bad_rows)
        report(f"bad rows are listed in {request.bad_rows}")
    return groups


def _with_limits(options: DataOptions, run: PastRun | None, report: Callable[[str], None]) -> DataOptions:
    """The options, sequences cut as the run cut them where nothing else was given."""
    if run is None:
        return options
    cut = {name: getattr(run.config, name) for name in _LIMITS if getattr(options, name) is None}
    cut = {name: limit for name, limit in cut.items() if limit is not None}
    if cut:
        report(f"{', '.join(f'{name} {limit}' for name, limit in cut.items())}, as {run.path} says")
    return replace(options, **cut)


def _describe(
    request: EvaluationRequest,
    trainer: PreferenceTrainer,
    groups: PreferenceDataset,
    source: ReferenceSource | None,
    metrics: dict[str, float],
) -> Evaluation:
    loss, selected = trainer.loss, trainer.eval_dataset
    assert selected is not None
    num_idle = sum(loss.idle(group) is not None for group in selected) if loss.can_be_idle else 0
    return Evaluation(
        model=request.model,
        data=str(request.data),
        loss=registered_name(loss),
        loss_args=trainer.args.loss_args or {},
        reference=None if source is None else source.description,
        num_groups=len(groups),
        num_counted=len(selected) - num_idle,
        num_responses=sum(map(len, selected)),
        metrics={name: value for name, value in metrics.items() if name.startswith("eval_")},  # no epoch
        counts_groups=loss.unit == "groups",
    )
