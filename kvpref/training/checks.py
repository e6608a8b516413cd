"""What the trainer checks before a run starts: that model, data and loss fit one another."""

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
from kvpref.models.attention_shapes import attention_shapes
from kvpref.models.output_layer import is_reward_model
from kvpref.models.shape import model_shape
from kvpref.models.support import unwrap
from kvpref.ops.attention import select_backend
from kvpref.ops.attention.backends.interface import Needs
from kvpref.parallel.sharding import is_sharded, will_be_sharded
from kvpref.training.arguments import PreferenceTrainingArguments, check_processes
from kvpref.training.evaluation import check_best_metric, check_evaluation
from kvpref.training.loading.selection import check_lengths
from kvpref.training.rounding import warn_of_lost_steps


def check_settings(
    model: nn.Module, args: PreferenceTrainingArguments, loss: PreferenceLoss, eval_data: object
) -> None:
    """Raise InputError for arguments that cannot work whatever the data is."""
    check_processes(args)
    check_model_kind(model, loss)
    check_evaluation(args, eval_data)


def check_model_kind(model: nn.Module, loss: PreferenceLoss) -> None:
    """Raise InputError if the model has not the head whose output the loss reads."""
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
        raise InputError(f"{found.format(reads, has)}; load AutoModelForCausalLM, or choose a loss of rewards")


def check_run(
    model: nn.Module,
    args: PreferenceTrainingArguments,
    loss: PreferenceLoss,
    datasets: Mapping[str, PreferenceDataset | None],
) -> None:
    """Check what can be told before a run starts, and say on stderr what each data set has to teach.

    Args:
        model: Attached model, on its device.
        args: The arguments.
        loss: The loss.
        datasets: ``train`` and ``eval``, where they are given.

    Raises:
        InputError: For the first thing that does not fit.
    """
    check_backend(model, args, has_reference=loss.needs_reference)
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
    """Ranks that hold pieces of a tower must run it equally often, and one may have no image in a micro-batch."""
    if dataset.images and (will_be_sharded() or is_sharded(model)):
        raise InputError(
            f"the {name} data hold images, and ranks of a sharded model (FSDP, DeepSpeed ZeRO-3) would run its vision "
            "tower a different number of times and wait for one another for ever; use DistributedDataParallel"
        )


def _say_what_routers_miss(model: nn.Module, args: PreferenceTrainingArguments) -> None:
    """Say on stderr that a loss which the model's config asks for is left out."""
    config = unwrap(model).config.get_text_config()
    if args.router_aux_loss_coef is None and getattr(config, "output_router_logits", False) and args.process_index == 0:
        own = getattr(config, "router_aux_loss_coef", None)
        print(
            "the model's config has output_router_logits=True, with which transformers and TRL add a load-balancing "
            f"loss of the experts; kvpref adds it with router_aux_loss_coef={0.001 if own is None else own} only",
            file=sys.stderr,
        )


def check_data(dataset: PreferenceDataset, model: nn.Module, loss: PreferenceLoss) -> None:
    """Raise InputError for the first group that is too long for the model, or lacks what the loss reads."""
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
        dataset: What is trained or evaluated on.
        loss: The loss.
        name: Of the data, ``train`` or ``eval``.

    Returns:
        A line that says how many there are.

    Raises:
        InputError: If there are none.
    """
    num_groups = len(dataset)
    if num_groups == 0:
        raise InputError(f"the {name} data has no groups; give at least one row")
    found = map(loss.idle, dataset) if loss.can_be_idle else ()
    idle = Counter(item for item in found if item is not None)
    num_idle, reasons = idle.total(), " or ".join(item.reason for item in idle)
    if num_idle == num_groups:
        remedies = "; ".join(dict.fromkeys(item.remedy for item in idle))
        raise InputError(
            f"the {name} data has nothing to learn for the loss {registered_name(loss)}: in all {num_groups} groups "
            f"{reasons}; {remedies}"
        )
    counted = f"{num_groups - num_idle} of {num_groups} groups count for the loss {registered_name(loss)}"
    return f"{name} data: {counted}; in the others {reasons}" if num_idle else f"{name} data: {counted}"


def check_backend(model: nn.Module, args: PreferenceTrainingArguments, *, has_reference: bool) -> None:
    """Raise InputError if a backend that was named cannot run where the model is, or where its reference is."""
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
    """(1, 1, D): a query of the dtype and head dim that the run's attention has, for the choice of a backend."""
    weights = (weight.dtype for weight in model.parameters() if weight.dtype.is_floating_point)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else next(weights, torch.float32)
    # The largest: backends have an upper bound.
    head_dim = max((kind.head_dim for kind in attention_shapes(unwrap(model))), default=1)
    return torch.empty(1, 1, head_dim, dtype=dtype, device=device)


def sample_needs(model: nn.Module) -> Needs:
    """What the run's attention needs of a backend besides: its largest values, and whether a layer caps scores."""
    plain = unwrap(model)
    return Needs(
        value_head_dim=max((kind.value_dim for kind in attention_shapes(plain)), default=0),
        softcap=any(getattr(module, "attn_logit_softcapping", None) for module in plain.modules()),
    )
