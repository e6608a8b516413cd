"""What a trainer knows that belongs in a model card."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpref.data import PreferenceDataset
from kvpref.data.statistics import TOKEN_SAVING
from kvpref.losses import PreferenceLoss, registered_name
from kvpref.losses.catalog import describe_loss
from kvpref.losses.interface import FunctionLoss
from kvpref.losses.mixture import WeightedSum
from kvpref.models.classes import sees_images
from kvpref.models.support import unwrap
from kvpref.training.adapters import is_peft
from kvpref.training.model_card import CardFacts, papers_of, public_name

if TYPE_CHECKING:
    from kvpref.training.trainer import PreferenceTrainer

_PACKAGES = ("kvpref", "torch", "transformers", "accelerate", "datasets", "tokenizers")


def card_facts(trainer: PreferenceTrainer, title: str | None = None, **metadata: Any) -> CardFacts:
    """The card of a trainer's model as it is now.

    Args:
        trainer: Its last evaluation is the card's.
        title: Default: the name of its output folder.
        **metadata: For the head of the page, such as ``license``; ``tags`` are added to its own.
    """
    args, loss = trainer.args, trainer.loss
    inner, name = unwrap(trainer.model), registered_name(loss)
    base = _base_model(trainer)
    is_reward, has_adapter = loss.reads == "ends", is_peft(trainer.model)
    data = {"train": trainer.train_dataset, "eval": trainer.eval_dataset}
    sources = [source for dataset in data.values() if dataset is not None for source in _sources(dataset)]
    started = "random weights" if base is None else f"`{public_name(base)}`"
    kind = "A reward model" if is_reward else "A LoRA adapter" if has_adapter else "A language model"
    own_tags = ["kvpref", name, *(["reward-model"] if is_reward else []), *(["lora"] if has_adapter else [])]
    own_tags += getattr(trainer.model, "model_tags", None) or []  # of tools that were reported to
    extra = metadata.pop("tags", None) or []
    return CardFacts(
        title=title or Path(args.output_dir or ".").absolute().name,
        base_model=base,
        datasets=tuple(dict.fromkeys(sources)),
        library="peft" if has_adapter else "transformers",
        task="text-classification" if is_reward else "image-text-to-text" if sees_images(inner.config) else _TEXT,
        tags=tuple(dict.fromkeys([*own_tags, *([extra] if isinstance(extra, str) else extra)])),
        summary=(
            f"{kind}, trained from {started} with the loss `{name}` by kvpref, which encodes each shared prompt once; "
            "the gradient is that of ordinary training."
        ),
        training={
            "base model": started.strip("`"),
            "loss": _loss(loss, args.loss_args or {}),
            **_reference(trainer),
            **{f"{key} data": _data(dataset) for key, dataset in data.items() if dataset is not None},
            **_saving(trainer),
            **_adapter(trainer),
            **_hyperparameters(trainer),
        },
        evaluation=_evaluation(trainer),
        versions=_versions(has_adapter),
        papers=_papers(loss),
        metadata={key: value for key, value in metadata.items() if value is not None},
    )


_TEXT = "text-generation"


def _base_model(trainer: PreferenceTrainer) -> str | None:
    for settings in getattr(trainer.model, "peft_config", {}).values():
        return settings.base_model_name_or_path or None
    return getattr(unwrap(trainer.model).config, "_name_or_path", None) or None


def _loss(loss: PreferenceLoss, given: Mapping[str, Any]) -> str:
    values = {item.name: getattr(loss, item.name) for item in fields(loss)} if is_dataclass(loss) else dict(given)
    settings = ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    return f"{registered_name(loss)}{f' with {settings}' if settings else ''}"


def _reference(trainer: PreferenceTrainer) -> dict[str, str]:
    if not trainer.loss.needs_reference:
        return {}
    args = trainer.args
    if args.reference_model is not None:
        return {"reference": public_name(args.reference_model)}
    if trainer.references.is_given:
        return {"reference": "a second model"}
    return {"reference": {"start": "the model before training", "base": "the base model"}[args.reference]}


def _sources(dataset: PreferenceDataset) -> list[str]:
    """The files or names that it was read from."""
    return [] if dataset.report is None else dataset.report.source.split(" + ")


def _data(dataset: PreferenceDataset) -> str:
    names = " + ".join(map(public_name, _sources(dataset)))
    named = f"{names}: " if names else ""
    num_responses = sum(map(len, dataset))
    return f"{named}{len(dataset)} groups, {num_responses} responses; fingerprint {dataset.fingerprint[:16]}"


def _saving(trainer: PreferenceTrainer) -> dict[str, str]:
    args, meter = trainer.args, trainer.token_meter
    saving = {"token saving": f"{meter.token_saving:.2f}x: {TOKEN_SAVING}"} if meter.num_groups else {}
    return saving | {"mode, schedule": f"{args.mode}, {args.schedule}"}


def _adapter(trainer: PreferenceTrainer) -> dict[str, str]:
    for settings in getattr(trainer.model, "peft_config", {}).values():
        targets = settings.target_modules
        kinds = {name.rpartition(".")[2] for name in targets or ()}
        names = targets if isinstance(targets, str) else ", ".join(sorted(kinds))
        rank, alpha = getattr(settings, "r", None), getattr(settings, "lora_alpha", None)
        kind = getattr(settings.peft_type, "value", settings.peft_type)
        return {"adapter": f"{kind}, rank {rank}, alpha {alpha}, on {names}"}
    return {}


def _hyperparameters(trainer: PreferenceTrainer) -> dict[str, str]:
    args, state = trainer.args, trainer.state
    groups = args.per_device_train_batch_size * args.num_data_ranks * args.gradient_accumulation_steps
    dtypes = sorted({str(item.dtype).removeprefix("torch.") for item in trainer.model.parameters()})
    autocast = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "no autocast"
    return {
        "learning rate": f"{args.learning_rate:g}, {_plain(args.lr_scheduler_type)}, warmup {args.warmup_steps:g}",
        "optimizer": f"{_plain(args.optim)}, weight decay {args.weight_decay:g}, gradients clipped at "
        f"{args.max_grad_norm:g}",
        "steps": f"{state.global_step} of {groups} groups, {state.epoch or 0:.3g} epochs",
        "processes": str(args.world_size),
        "precision": f"{' and '.join(dtypes)} weights, {autocast}",
        "seed": str(args.seed),
    }


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


def _evaluation(trainer: PreferenceTrainer) -> dict[str, float]:
    """The metrics of the last evaluation."""
    last = next((line for line in reversed(trainer.state.log_history) if "eval_loss" in line), {})
    return {
        name.removeprefix("eval_"): value
        for name, value in last.items()
        if name.startswith("eval_") and isinstance(value, int | float)
    }


def _versions(has_adapter: bool) -> dict[str, str]:
    found = {}
    for name in (*_PACKAGES, *(["peft"] if has_adapter else [])):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _papers(loss: PreferenceLoss) -> tuple[tuple[str, str], ...]:
    """Those of the loss, and of its settings where they are not the defaults; a mixture has those of its parts."""
    texts = [inspect.getdoc(loss.function if isinstance(loss, FunctionLoss) else type(loss)) or ""]
    if is_dataclass(loss):
        settings = describe_loss(registered_name(loss), type(loss)).settings
        texts += [item.explanation for item in settings if getattr(loss, item.name, None) != item.default]
    parts = getattr(loss, "parts", {}) if isinstance(loss, WeightedSum) else {}
    return tuple(dict.fromkeys([*papers_of(*texts), *(paper for part in parts.values() for paper in _papers(part))]))
