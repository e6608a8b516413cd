"""Which groups go into which step and micro-batch, according to the arguments."""

from __future__ import annotations

from torch import nn

from kvpref.data import CostModel, PreferenceDataset, StepBatcher, StepOptions, Waits
from kvpref.models.shape import model_shape
from kvpref.parallel.sharding import gathers_in_passes
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
    """Plan steps of ``groups_per_device * num_data_ranks`` groups, keeping groups with common beginnings together.

    Args:
        groups: The training data.
        args: Sizes, limits and the order.
        reads: What the model and the loss read, if it matters whether prompts are shared only as wholes.
        groups_per_device: Groups per step and rank, or per set of ranks that share micro-batches.
        shuffle: Whether the order is random.
        cost_model: The cost by which ranks are balanced, the same on every rank; see `make_cost_model`. Tokens if None.
    """
    whole = reads is not None and reads.states
    lengths = groups.batching_lengths(args.min_shared_tokens, args.max_prefix_depth, whole_segments=whole)
    options = StepOptions(
        groups_per_step=groups_per_device * args.num_data_ranks,
        max_tokens_per_micro_batch=token_budget(args, groups, whole_segments=whole),
        takes_larger_groups=args.schedule == "bounded" or runs_larger_in_chunks(args),
        mode=args.mode,  # type: ignore[arg-type]
        world_size=args.num_data_ranks,
        waits=where_ranks_wait(args),
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle=shuffle,
        window_steps=args.sort_window_steps,
    )
    clusters = None
    # Prompts that share a beginning take one more level than responses that share a prompt.
    if args.max_prefix_depth is None or args.max_prefix_depth > 1:
        clusters = groups.clusters(
            options.groups_per_step,
            args.min_shared_tokens,
            whole_prompts=reads is not None and reads.spans == "prompts",
        )
    return StepBatcher(lengths, options, groups.group_ids, cost_model, clusters)


def runs_larger_in_chunks(args: PreferenceTrainingArguments) -> bool:
    """Whether a group that exceeds the budget by itself runs in chunks in schedule ``full``.

    Ranks that gather weights or exchange heads in each pass all run the same passes, which the chunks of one would
    upset.
    """
    if args.schedule != "full" or args.mode != "two_pass":
        return False
    alone = args.world_size == 1
    return alone or not (args.sequence_parallel > 1 or args.deepspeed_plugin is not None or gathers_in_passes())


def where_ranks_wait(args: PreferenceTrainingArguments) -> Waits:
    """Where ranks wait for one another: in each pass, at each micro-batch, or at the end of the step.

    FSDP2 keeps weights for all passes of a micro-batch in schedule ``full``, and as long as requested in ``bounded``.
    """
    if args.world_size == 1 or not gathers_in_passes():
        return "step"
    if args.schedule != "bounded":
        return "micro_batch"
    return "step" if args.gather_weights == args.reduce_grads == "step" else "pass"


def make_cost_model(model: nn.Module, mode: str) -> CostModel:
    """The FLOPs of a micro-batch under `model`, not yet wrapped, in a mode.

    FLOPs, not seconds: every rank must make the same plan, but measured seconds differ. Call it before FSDP shards the
    model, when the sizes of the weights are still the same everywhere.
    """
    return CostModel.from_shape(model_shape(model), mode)
