"""Statistics of a dataset and of the micro-batches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from kvpref.data.batching.costs import CostModel, Mode
from kvpref.data.batching.group_costs import GroupCosts
from kvpref.data.batching.lengths import common_beginning
from kvpref.data.batching.steps import MicroBatch, StepBatcher
from kvpref.data.dataset import PreferenceDataset
from kvpref.data.summaries import LengthSummary, summarize
from kvpref.data.trajectory_statistics import TrajectoryStatistics, summarize_trajectories
from kvpref.records.groups import Group

DATA_SAVING = "tokens of all sequences per unique token: what sequences of a group begin with alike counts once"
"""Definition of a dataset's saving, independent of steps."""

TOKEN_SAVING = (
    "tokens of all sequences per token that runs in the steps: what groups of one step begin with counts once too, "
    "padding counts"
)
"""Definition of the saving of steps, the trainer's `token_saving`."""


@dataclass(frozen=True, kw_only=True)
class ImageStatistics:
    """The images of a dataset, and what sharing them saves, separately from text."""

    num_images: int
    """Images of all groups, counted once per group and place."""

    num_unique_images: int
    """Distinct images: how often a vision tower would run if all groups were in one step."""

    num_groups_with_images: int
    """Groups whose prompt has images."""

    image_tokens: LengthSummary
    """Placeholders per group that has images."""

    total_image_tokens: int
    """Placeholders of all sequences, prompts repeated."""

    unique_image_tokens: int
    """Placeholders when the beginning that all sequences of a group share is encoded once."""

    image_saving: float
    """total_image_tokens / unique_image_tokens."""

    text_saving: float
    """The same for all other tokens."""


@dataclass(frozen=True, kw_only=True)
class DataStatistics:
    """Lengths of a dataset and what sharing its prompts can save."""

    num_groups: int
    """Groups."""

    num_sequences: int
    """Sequences of all groups."""

    sequences_per_group: LengthSummary
    """N: sequences per group."""

    prompt_tokens: LengthSummary
    """Prompt tokens per group (the tokens before the first scored one)."""

    response_tokens: LengthSummary
    """Response tokens per sequence, EOS included."""

    prompt_share: float
    """Prompt tokens / all tokens when every sequence is encoded whole, from 0 to 1."""

    total_tokens: int
    """Tokens of all sequences, prompts repeated."""

    unique_tokens: int
    """Tokens when the beginnings that sequences of a group share are encoded once."""

    prompt_saving: float
    """sum N(P+R) / sum(P + sum R): the saving of the data if only prompts counted once."""

    prefix_saving: float
    """total_tokens / unique_tokens, see `DATA_SAVING`: shared beginnings of responses also count once."""

    images: ImageStatistics | None = None
    """None if no group has images; placeholders count among the prompt tokens above."""

    trajectories: TrajectoryStatistics | None = None
    """None if no row holds trajectories."""


@dataclass(frozen=True, kw_only=True)
class BatchStatistics:
    """The micro-batches under a budget, in the first epoch."""

    mode: Mode
    """The mode whose tokens were counted."""

    world_size: int
    """Ranks that the steps were planned for."""

    num_steps: int
    """Optimizer steps per epoch."""

    num_micro_batches: int
    """Micro-batches per epoch over all ranks, fillers left out."""

    num_fillers: int
    """Micro-batches that only keep the ranks in step."""

    micro_batches_per_step: float
    """Mean over all ranks, fillers left out."""

    num_sharing_groups: int
    """Groups that begin like others and are planned into one step with them; 0 if the batcher knows of none."""

    largest_cluster: int
    """The most groups that begin alike; 1 if all are alone."""

    tokens_per_micro_batch: LengthSummary
    """Tokens that the model processes, padding included if the mode pads."""

    num_larger_groups: int
    """Groups that alone exceed the budget, if the options allow them."""

    budget_fill: float | None
    """Mean tokens / budget, above 1 only with larger groups; None without a budget."""

    padding_share: float
    """Padding tokens / processed tokens, from 0 to 1; 0 in the modes that do not pad."""

    token_saving: float
    """See `TOKEN_SAVING`; fillers left out."""

    cost_unit: str
    """The unit of the costs below: tokens, FLOPs or seconds."""

    imbalance: float
    """Mean over the steps of (cost of the costliest rank / mean cost of the ranks) - 1; fillers cost too."""

    costliest_rank_per_step: float
    """Mean over the steps of the costliest rank's cost: what a step takes if ranks wait at its end (DDP)."""

    costliest_micro_batches_per_step: float
    """Mean over the steps of the sum of each round's costliest micro-batch: the same if ranks wait for one another
    at each micro-batch (FSDP)."""


def summarize_dataset(dataset: PreferenceDataset) -> DataStatistics:
    """Measure a dataset.

    Raises:
        ValueError: If it has no groups.
    """
    prompts, responses, sequences = [], [], []
    repeated_prompt_tokens = shared = 0
    for group, lengths in zip(dataset, dataset.lengths, strict=True):
        starts = _response_starts(group)
        prompts.append(min(starts))
        responses += [len(sequence) - start for sequence, start in zip(group.sequences, starts, strict=True)]
        sequences.append(len(group))
        rows = [len(sequence.parts) for sequence in group.sequences]
        repeated_prompt_tokens += sum(start * count for start, count in zip(starts, rows, strict=True))
        # Attempts at a task may have different questions after one system prompt.
        shared += (sum(rows) - 1) * min(*starts, lengths.beginning_tokens)
    total = sum(lengths.total_tokens for lengths in dataset.lengths)
    unique = sum(lengths.unique_tokens for lengths in dataset.lengths)
    return DataStatistics(
        num_groups=len(dataset),
        num_sequences=sum(sequences),
        sequences_per_group=summarize(sequences),
        prompt_tokens=summarize(prompts),
        response_tokens=summarize(responses),
        prompt_share=repeated_prompt_tokens / total,
        total_tokens=total,
        unique_tokens=unique,
        prompt_saving=total / (total - shared),
        prefix_saving=total / unique,
        images=_summarize_images(dataset, total, unique),
        trajectories=summarize_trajectories(dataset),
    )


def _summarize_images(dataset: PreferenceDataset, total_tokens: int, unique_tokens: int) -> ImageStatistics | None:
    num_images, per_group, total, unique = 0, [], 0, 0
    for group in dataset if dataset.images else ():
        placed = [sequence.images for sequence in group.sequences]
        if not any(placed):
            continue
        shared = common_beginning(group)
        in_sequences = sum(item.image.num_tokens for images in placed for item in images)
        in_beginning = sum(max(0, min(stop, shared) - first) for _, runs in placed[0] for first, stop in runs)
        num_images += max(map(len, placed))
        per_group.append(max(sum(item.image.num_tokens for item in images) for images in placed))
        total += in_sequences
        unique += in_sequences - in_beginning * (len(placed) - 1)
    if not per_group:
        return None
    return ImageStatistics(
        num_images=num_images,
        num_unique_images=len(dataset.images),
        num_groups_with_images=len(per_group),
        image_tokens=summarize(per_group),
        total_image_tokens=total,
        unique_image_tokens=unique,
        image_saving=total / unique,
        text_saving=(total_tokens - total) / (unique_tokens - unique),
    )


def _response_starts(group: Group) -> list[int]:
    """Number of tokens before the first scored one, for each response."""
    # In a response of several rows, the first row holds its first turn.
    firsts = [sequence.parts[0] for sequence in group.sequences]
    return [int(first.flags.argmax()) if first.num_scored else len(first) for first in firsts]


def summarize_batches(batcher: StepBatcher, cost_model: CostModel | None = None) -> BatchStatistics:
    """Measure the micro-batches of the first epoch.

    Args:
        batcher: Plans the steps.
        cost_model: A better estimate of what micro-batches cost than the batcher's own model, if there is one.
    """
    steps = batcher.steps(0)
    planned = [micro_batch for step in steps for rank in step for micro_batch in rank]
    real = [micro_batch for micro_batch in planned if not micro_batch.is_filler]
    tokens = [batcher.micro_batch_tokens(micro_batch) for micro_batch in real]
    budget = batcher.options.max_tokens_per_micro_batch
    padding = 0
    if batcher.options.mode == "padded":
        padding = sum(tokens) - sum(batcher.micro_batch_lengths(micro_batch).total_tokens for micro_batch in real)
    model = cost_model or batcher.costs.cost_model
    priced = GroupCosts(batcher.lengths, batcher.options.mode, model, clusters=batcher.clusters)
    costs = [[[priced.run_cost(item.group_indices) for item in rank] for rank in step] for step in steps]
    by_rank = [list(map(sum, step)) for step in costs]
    return BatchStatistics(
        mode=batcher.options.mode,
        world_size=batcher.options.world_size,
        num_steps=batcher.num_steps,
        num_micro_batches=len(real),
        num_fillers=len(planned) - len(real),
        micro_batches_per_step=len(real) / batcher.num_steps,
        num_sharing_groups=0 if batcher.clusters is None else batcher.clusters.num_sharing_groups,
        largest_cluster=1 if batcher.clusters is None else batcher.clusters.largest,
        tokens_per_micro_batch=summarize(tokens),
        num_larger_groups=len(batcher.larger_groups),
        budget_fill=None if budget is None else sum(tokens) / len(tokens) / budget,
        padding_share=padding / sum(tokens),
        token_saving=_total_tokens(batcher, real) / sum(tokens),
        cost_unit=model.unit,
        imbalance=fmean(max(ranks) * len(ranks) / sum(ranks) - 1 for ranks in by_rank),
        costliest_rank_per_step=fmean(map(max, by_rank)),
        costliest_micro_batches_per_step=fmean(sum(map(max, zip(*step, strict=True))) for step in costs),
    )


def _total_tokens(batcher: StepBatcher, micro_batches: Sequence[MicroBatch]) -> int:
    return sum(batcher.lengths[index].total_tokens for item in micro_batches for index in item.group_indices)
