"""Which groups go into which step and micro-batch, as the arguments ask."""

from __future__ import annotations

from torch import nn

from kvpref.data import CostModel, PreferenceDataset, StepBatcher, StepOptions
from kvpref.models.shape import model_shape
from kvpref.plan.passes import Reads
from kvpref.training.arguments import PreferenceTrainingArguments
from kvpref.training.defaults import token_budget


def make_batcher(
    groups: PreferenceDataset,
    args: PreferenceTrainingArguments,
    reads: Reads | None = None,
    *,
    groups_per_device: int,
    shuffle: bool,
    cost_model: CostModel | None = None,
) -> StepBatcher:
    """Plan steps of ``groups_per_device * world_size`` groups, those that begin alike together.

    Args:
        groups: What to train on.
        args: Sizes, limits and the order.
        reads: What the model and the loss read, where it matters whether prompts are shared only as wholes.
        groups_per_device: Groups per step and rank.
        shuffle: Whether the order is random.
        cost_model: What ranks are balanced by, the same on every rank; see `make_cost_model`. Tokens if None.
    """
    lengths = groups.batching_lengths(args.min_shared_tokens, args.max_prefix_depth)
    options = StepOptions(
        groups_per_step=groups_per_device * args.world_size,
        max_tokens_per_micro_batch=token_budget(args, groups),
        mode=args.mode,  # type: ignore[arg-type]
        world_size=args.world_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle=shuffle,
        window_steps=args.sort_window_steps,
    )
    clusters = None
    # Prompts that share a beginning take one depth more than responses that share a prompt.
    if args.max_prefix_depth is None or args.max_prefix_depth > 1:
        clusters = groups.clusters(
            options.groups_per_step,
            args.min_shared_tokens,
            whole_prompts=reads is not None and reads.spans == "prompts",
        )
    return StepBatcher(lengths, options, groups.group_ids, cost_model, clusters)


def make_cost_model(model: nn.Module, mode: str) -> CostModel:
    """The FLOPs of a micro-batch under `model`, as yet unwrapped, in a mode.

    FLOPs and not seconds: every rank must plan alike, and measured seconds differ. Call it before FSDP shards the
    model, when the sizes of the weights are still the same everywhere.
    """
    return CostModel.from_shape(model_shape(model), mode)
