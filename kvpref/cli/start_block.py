"""What a run is about to do, in one block at its start."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from torch import nn

from kvpref.cli.given_settings import Settings
from kvpref.cli.predicted_run import PredictedRun
from kvpref.cli.run_config import RunConfig
from kvpref.cli.sizes import size_in_words
from kvpref.data import PreferenceDataset, StepBatcher, summarize_batches, summarize_dataset
from kvpref.data.batching.budgets import DEFAULT_MAX_TOKENS
from kvpref.engine.reads import reads_of
from kvpref.losses import PreferenceLoss, registered_name
from kvpref.models.partitioned import num_values
from kvpref.models.support import unwrap
from kvpref.models.vision.parts import vision_parts
from kvpref.ops.attention import select_backend
from kvpref.ops.attention.backends import choose_automatically
from kvpref.training import PreferenceTrainer, PreferenceTrainingArguments
from kvpref.training.checks import sample_needs, sample_query
from kvpref.training.defaults import AUTO, trains_an_adapter
from kvpref.training.loading.batcher import make_batcher, make_cost_model

_STATES_PER_WEIGHT = {"adamw": 2, "adam": 2, "sgd": 0}
"""Numbers that an optimizer keeps for a weight, by how its name begins."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is known before the first step.

    Attributes:
        lines: For the user.
        step_costs: FLOPs of each optimizer step of the first epoch, on the rank with the most.
        num_steps: Optimizer steps of the whole run.
    """

    lines: tuple[str, ...]
    step_costs: tuple[float, ...]
    num_steps: int


def describe_start(trainer: PreferenceTrainer, run: RunConfig, given: Settings, memory: str | None = None) -> Start:
    """Everything that a user may want to check before hours are spent.

    Args:
        trainer: As it is about to train.
        run: Its settings.
        given: The settings that were given; all others are defaults.
        memory: What is predicted of the peak, if anything is.
    """
    args, dataset, loss = trainer.args, trainer.train_dataset, trainer.loss
    assert dataset is not None
    cost_model = make_cost_model(trainer.model, args.mode)
    batcher = make_batcher(
        dataset,
        args,
        reads_of(trainer.model, loss.reads),
        groups_per_device=args.per_device_train_batch_size,
        shuffle=True,
        cost_model=cost_model,
    )
    costs = [cost / args.sequence_parallel for cost in _step_costs(batcher, args.gradient_accumulation_steps)]
    num_steps = args.max_steps if args.max_steps > 0 else ceil(len(costs) * args.num_train_epochs)
    predicted = PredictedRun(trainer, run, _per_run(costs, num_steps))
    memory = memory or predicted.peak()
    facts = {
        "model": _model(trainer.model, run),
        **_parts(trainer.model),
        "precision": f"{_dtypes(trainer.model)} weights, {_autocast(args)}",
        "attention": _attention(trainer.model, args),
        "loss": _loss(loss, args),
        "learning rate": _learning_rate(trainer, given, num_steps),
        "data": _data(dataset),
        "steps": _steps(args, num_steps, len(costs)),
        **_batches(batcher, given, args),
        "memory": ", ".join(filter(None, [_resident(trainer.model, args), memory])),
        "work": predicted.work(),
    }
    width = max(map(len, facts)) + 2
    lines = tuple(f"{name:<{width}}{value}" for name, value in facts.items())
    return Start(lines=lines, step_costs=tuple(costs), num_steps=num_steps)


def _model(model: nn.Module, run: RunConfig) -> str:
    num_weights = sum(map(num_values, model.parameters()))
    num_trained = sum(num_values(item) for item in model.parameters() if item.requires_grad)
    share = "all trained" if num_trained == num_weights else f"{num_trained:,} of them trained"
    if trains_an_adapter(model):
        share += ", an adapter"
    return f"{run.model or f'random weights of {run.model_config}'}, {num_weights:,} parameters, {share}"


def _parts(model: nn.Module) -> dict[str, str]:
    """Where the weights of a model that sees images are."""
    inner = unwrap(model)
    found = vision_parts(inner)
    if not found.weights:
        return {}
    outside = {id(weight) for weight in found.weights.values()}
    parts = {
        "vision tower": list(found.tower.values()),
        "projector": list(found.projector.values()),
        "language model": [weight for weight in inner.parameters() if id(weight) not in outside],
    }
    return {"parts": ", ".join(f"{name} {_count(weights)}" for name, weights in parts.items())}


def _count(weights: list[nn.Parameter]) -> str:
    total = sum(map(num_values, weights))
    trained = sum(num_values(item) for item in weights if item.requires_grad)
    if trained == total:
        return f"{total:,}"
    return f"{total:,} ({trained:,} trained)" if trained else f"{total:,} (frozen)"


def _dtypes(model: nn.Module) -> str:
    """Of the trained weights, and of the others where they differ."""
    trained, frozen = (
        {str(item.dtype).removeprefix("torch.") for item in model.parameters() if item.requires_grad is flag}
        for flag in (True, False)
    )
    names = " and ".join(sorted(trained))
    return f"{names} trained and {' and '.join(sorted(frozen))} frozen" if frozen - trained else names


def _autocast(args: PreferenceTrainingArguments) -> str:
    return "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "no autocast"


def _attention(model: nn.Module, args: PreferenceTrainingArguments) -> str:
    if args.mode == "padded":
        return "transformers' sdpa (mode padded)"
    query, needs = sample_query(model, args, args.device), sample_needs(model)
    if args.backend == "auto":
        return f"auto takes {choose_automatically(query, needs)}"
    backend = select_backend(args.backend, query, needs)
    return f"{backend.name} ({backend.provider()})"


def _loss(loss: PreferenceLoss, args: PreferenceTrainingArguments) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in (args.loss_args or {}).items())
    named = f"{registered_name(loss)}{f' with {settings}' if settings else ''}"
    if not loss.needs_reference:
        return f"{named}, no reference"
    which = args.reference_model or {"start": "the model before training", "base": "the model without its adapter"}.get(
        args.reference
    )
    how = "log-probs stored before the first step" if args.precompute_reference else "computed batch by batch"
    return f"{named}; reference: {which}, {how}"


def _learning_rate(trainer: PreferenceTrainer, given: Settings, num_steps: int) -> str:
    args = trainer.args
    name, what = registered_name(trainer.loss), "an adapter" if trains_an_adapter(trainer.model) else "all weights"
    why = given["learning_rate"].where if "learning_rate" in given else f"default for {name} and {what}"
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    num_warmup = args.get_warmup_steps(num_steps)
    after = "more than the run has: it never reaches its peak" if num_warmup > num_steps else f"then {schedule}"
    return f"{args.learning_rate:g} ({why}), warmup steps: {num_warmup}, {after}"


def _data(dataset: PreferenceDataset) -> str:
    found = summarize_dataset(dataset)
    prompts, responses, counts = found.prompt_tokens, found.response_tokens, found.sequences_per_group
    each = f"{counts.p50} responses" if counts.p50 == counts.max else f"{counts.p50} responses, at most {counts.max}"
    return (
        f"{found.num_groups} groups of {each}; tokens of a prompt: median {prompts.p50}, at most {prompts.max}; "
        f"of a response: {responses.p50}, {responses.max}"
    )


def _steps(args: PreferenceTrainingArguments, num_steps: int, steps_per_epoch: int) -> str:
    groups = args.per_device_train_batch_size * args.num_data_ranks * args.gradient_accumulation_steps
    devices = f" over {args.world_size} devices" if args.world_size > 1 else ""
    devices += f", {args.sequence_parallel} to a micro-batch" if args.sequence_parallel > 1 else ""
    return f"{num_steps} of {groups} groups{devices}; epochs: {num_steps / max(1, steps_per_epoch):.3g}"


def _batches(batcher: StepBatcher, given: Settings, args: PreferenceTrainingArguments) -> dict[str, str]:
    found = summarize_batches(batcher)
    budget = batcher.options.max_tokens_per_micro_batch
    if "max_tokens_per_micro_batch" in given:
        why = given["max_tokens_per_micro_batch"].where
    elif budget is None:
        why = "the loss couples the groups of a micro-batch"
    elif args.max_tokens_per_micro_batch == AUTO:
        why = "default" if budget == DEFAULT_MAX_TOKENS else "what the largest group takes"
    else:
        why = "what fits"
    bound = "without a bound" if budget is None else f"of at most {budget} tokens"
    run = found.tokens_per_micro_batch.mean * found.num_micro_batches
    repeated = sum(lengths.total_tokens for lengths in batcher.lengths)
    if batcher.larger_groups:
        bound += f", but for {len(batcher.larger_groups)} groups that take more and run alone, in chunks"
    return {
        "micro-batches": f"{found.micro_batches_per_step:.3g} per step, {bound} ({why})",
        "saving": f"at least {repeated / run:.2f}x fewer tokens run in mode {found.mode} than with prompts repeated",
    }


def _resident(model: nn.Module, args: PreferenceTrainingArguments) -> str:
    """Of weights, gradients and optimizer state, which stay from step to step."""
    weights = sum(num_values(item) * item.itemsize for item in model.parameters())
    trained = sum(num_values(item) * item.itemsize for item in model.parameters() if item.requires_grad)
    if args.deepspeed_plugin is not None:
        whole = size_in_words(weights + trained)
        return f"{whole} of weights and gradients in a step; the optimizer's state is in {args.world_size} pieces"
    name = str(getattr(args.optim, "value", args.optim))
    states = next((count for start, count in _STATES_PER_WEIGHT.items() if name in (start, f"{start}_torch")), None)
    if name == "adamw_torch_fused":
        states = 2
    if states is None:
        return f"{size_in_words(weights + trained)} of weights and gradients, and what {name} keeps"
    return f"{size_in_words(weights + trained * (1 + states))} of weights, gradients and optimizer state"


def _step_costs(batcher: StepBatcher, accumulation: int) -> list[float]:
    """Cost of each optimizer step of the first epoch, on the rank with the most."""
    planned = [max(sum(map(batcher.micro_batch_cost, rank)) for rank in step) for step in batcher.steps(0)]
    return [sum(planned[start : start + accumulation]) for start in range(0, len(planned), accumulation)]


def _per_run(costs: list[float], num_steps: int) -> float:
    return sum(costs) * num_steps / max(1, len(costs))
