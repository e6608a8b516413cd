"""Checks before a run starts: model, data and loss have to fit one another."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn
from transformers.training_args import OptimizerNames

from kvpref.data import PreferenceDataset
from kvpref.errors import InputError
from kvpref.losses import PreferenceLoss, loss_name, registered_name
from kvpref.losses.interface import Idle
from kvpref.models.attention_shapes import attention_shapes
from kvpref.models.output_layer import is_reward_model
from kvpref.models.shape import model_shape
from kvpref.models.support import unwrap
from kvpref.ops.attention import select_backend
from kvpref.ops.attention.backends.interface import Needs
from kvpref.parallel.sequence import check_options
from kvpref.parallel.sharding import gathers_in_passes, will_be_sharded
from kvpref.training.arguments import PreferenceTrainingArguments, check_processes
from kvpref.training.deepspeed import check_weights
from kvpref.training.evaluation import check_best_metric, check_evaluation
from kvpref.training.loading.selection import check_lengths
from kvpref.training.rounding import warn_of_lost_steps


def check_settings(
    model: nn.Module, args: PreferenceTrainingArguments, loss: PreferenceLoss, eval_data: object
) -> None:
    """Raise InputError for arguments that cannot work, whatever the data."""
    check_processes(args)
    check_weights(model, args)
    check_model_kind(model, loss)
    check_evaluation(args, eval_data)


def check_model_kind(model: nn.Module, loss: PreferenceLoss) -> None:
    """Raise InputError if the model lacks the head whose output the loss reads."""
    inner = unwrap(model)
    found = f"loss {loss_name(loss)!r} reads {{}}, and {type(inner).__name__} {{}}"
    if loss.reads == "ends":
        if not is_reward_model(inner):
            reads, has = "one reward per response", "has a language-model head"
            raise InputError(f"{found.format(reads, has)}; load AutoModelForSequenceClassification with num_labels=1")
        if inner.config.num_labels != 1:
            reads, has = "one reward per response", f"gives {inner.config.num_labels} numbers"
            raise InputError(f"{found.format(reads, has)}; load it with num_labels=1")
    elif is_reward_model(inner):
        reads, has = "log-probs of tokens", "has none"
        raise InputError(f"{found.format(reads, has)}; load AutoModelForCausalLM, or choose a loss on rewards")


def check_run(
    model: nn.Module,
    args: PreferenceTrainingArguments,
    loss: PreferenceLoss,
    datasets: Mapping[str, PreferenceDataset | None],
) -> None:
    """Check what can be known before a run starts, and report on stderr how much of each dataset can be learned from.

    Args:
        model: Attached model, on its device.
        args: The arguments.
        loss: The loss.
        datasets: ``train`` and ``eval``, if given.

    Raises:
        InputError: For the first mismatch.
    """
    check_backend(model, args, has_reference=loss.needs_reference)
    images = any(dataset is not None and dataset.images for dataset in datasets.values())
    check_options(model, mode=args.mode, has_images=images, balances_experts=args.router_aux_loss_coef is not None)
    if args.deepspeed_plugin is None:  # whose optimizer keeps float32 weights beside the model's
        warn_of_lost_steps(model, args.learning_rate or 0.0, OptimizerNames(args.optim).value)
    _say_what_routers_miss(model, args)
    for name, dataset in datasets.items():
        if dataset is not None:
            check_data(dataset, model, loss)
            _refuse_images_on_shards(dataset, model, name)
            line = check_learnable(dataset, loss, name)
            if args.process_index == 0:
                print(line, file=sys.stderr)
    if datasets["eval"] is not None:
        check_best_metric(args, datasets["eval"], loss, model_shape(model).hidden_size)


def _refuse_images_on_shards(dataset: PreferenceDataset, model: nn.Module, name: str) -> None:
    """Refuse images under ZeRO-3, where ranks without images may fall out of step; FSDP2 gathers towers on all."""
    if dataset.images and will_be_sharded() and not gathers_in_passes():
        raise InputError(
            f"the {name} data hold images, and a vision tower that DeepSpeed ZeRO-3 shards is not proved to be exact "
            "where some ranks have no images; use FSDP2, ZeRO-2 or DistributedDataParallel"
        )


def _say_what_routers_miss(model: nn.Module, args: PreferenceTrainingArguments) -> None:
    """Report on stderr that a loss requested by the model's config is left out."""
    config = unwrap(model).config.get_text_config()
    if args.router_aux_loss_coef is None and getattr(config, "output_router_logits", False) and args.process_index == 0:
        own = getattr(config, "router_aux_loss_coef", None)
        print(
            "the model's config has output_router_logits=True, with which transformers and TRL add a load-balancing "
            f"loss of the experts; kvpref adds it with router_aux_loss_coef={0.001 if own is None else own} only",
            file=sys.stderr,
        )


def check_data(dataset: PreferenceDataset, model: nn.Module, loss: PreferenceLoss) -> None:
    """Raise InputError for the first group that is too long for the model or lacks a column that the loss reads."""
    check_lengths(dataset, model)
    check_columns(dataset, loss)


def check_columns(dataset: PreferenceDataset, loss: PreferenceLoss) -> None:
    """Raise InputError for the first group without a column that the loss reads."""
    if not loss.columns:
        return
    for group in dataset:
        for name in loss.columns:
            if name not in group.columns:
                has = ", ".join(group.columns) or "none"
                raise InputError(
                    f"{group.id}: loss {loss_name(loss)!r} reads the column {name!r}, which this group lacks; its "
                    f"extra columns: {has}"
                )


def check_learnable(dataset: PreferenceDataset, loss: PreferenceLoss, name: str) -> str:
    """Count the groups that the loss learns from.

    Args:
        dataset: The training or evaluation data.
        loss: The loss.
        name: The name of the data, ``train`` or ``eval``.

    Returns:
        A line that says how many there are, and what may not be meant in some of them.

    Raises:
        InputError: If there are none.
    """
    num_groups = len(dataset)
    if num_groups == 0:
        raise InputError(f"the {name} data has no groups; give at least one row")
    idle: Counter[Idle] = Counter()
    cautions: Counter[str] = Counter()
    for group in dataset if loss.can_be_idle else ():
        if (found := loss.idle(group)) is not None:
            idle[found] += 1
        elif (caution := loss.caution(group)) is not None:
            cautions[caution] += 1
    num_idle, reasons = idle.total(), " or ".join(item.reason for item in idle)
    if num_idle == num_groups:
        remedies = "; ".join(dict.fromkeys(item.remedy for item in idle))
        raise InputError(
            f"the {name} data has nothing to learn for the loss {registered_name(loss)}: in all {num_groups} groups "
            f"{reasons}; {remedies}"
        )
    counted = f"{num_groups - num_idle} of {num_groups} groups count for the loss {registered_name(loss)}"
    line = f"{name} data: {counted}; in the others {reasons}" if num_idle else f"{name} data: {counted}"
    return "; ".join([line, *(f"in {number} of those that count {caution}" for caution, number in cautions.items())])


def check_backend(model: nn.Module, args: PreferenceTrainingArguments, *, has_reference: bool) -> None:
    """Raise InputError if the named backend cannot run on the device of the model or of its reference."""
    if args.backend == "auto":
        return
    needs = sample_needs(model)
    select_backend(args.backend, sample_query(model, args, args.device), needs)
    if has_reference and args.reference_device is not None:
        try:
            select_backend(args.backend, sample_query(model, args, args.reference_device), needs)
        except InputError as error:
            raise InputError(f"reference_device {args.reference_device}: {error}; backend auto serves both") from error


def sample_query(model: nn.Module, args: PreferenceTrainingArguments, device: torch.device | str) -> torch.Tensor:
    """(1, 1, D): a query with the dtype and head dim of the run's attention, for choosing a backend."""
    weights = (weight.dtype for weight in model.parameters() if weight.dtype.is_floating_point)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else next(weights, torch.float32)
    # The largest head dim: backends have an upper bound.
    head_dim = max((kind.head_dim for kind in attention_shapes(unwrap(model))), default=1)
    return torch.empty(1, 1, head_dim, dtype=dtype, device=device)


def sample_needs(model: nn.Module) -> Needs:
    """What else the run's attention needs from a backend: the head dim of its largest values, and softcapping."""
    plain = unwrap(model)
    return Needs(
        value_head_dim=max((kind.value_dim for kind in attention_shapes(plain)), default=0),
        softcap=any(getattr(module, "attn_logit_softcapping", None) for module in plain.modules()),
    )
