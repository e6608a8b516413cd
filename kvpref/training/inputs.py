"""From planned micro-batches to collated inputs; runs in data workers, or in a thread ahead of use."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from kvpref.data import CostModel, MicroBatch, PlannedStep, PreferenceDataset, StepOptions, StepPlanner, StepSampler
from kvpref.engine.options import EngineOptions
from kvpref.errors import InputError
from kvpref.losses import PreferenceLoss
from kvpref.models.shape import model_shape
from kvpref.models.support import unwrap
from kvpref.plan.batch import Batch, collate
from kvpref.plan.passes import Reads
from kvpref.plan.step import Step, join_batches
from kvpref.records.groups import Group
from kvpref.training.arguments import PreferenceTrainingArguments
from kvpref.training.defaults import token_budget
from kvpref.training.prefetch import Prefetcher


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatchInputs:
    """One collated micro-batch.

    Attributes:
        batch: Its groups.
        group_indices: Where they stand in the dataset.
        is_filler: Run it with weight 0; it only keeps the ranks in step.
    """

    batch: Batch
    group_indices: tuple[int, ...]
    is_filler: bool

    def pin_memory(self) -> MicroBatchInputs:
        """The same in page-locked memory; DataLoader calls this for what its workers send."""
        return replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True, kw_only=True, eq=False)
class StepInputs:
    """What one rank runs in one planned step.

    Attributes:
        micro_batches: In the order in which they run.
        joined: The same for the bounded schedule, in the same order: one `Step` of all of them, or one of each where
            nothing is shared between them. Empty in schedule ``full``.
    """

    micro_batches: tuple[MicroBatchInputs, ...]
    joined: tuple[Step, ...] = ()

    def __iter__(self) -> Iterator[MicroBatchInputs]:
        return iter(self.micro_batches)

    def pin_memory(self) -> StepInputs:
        """The same in page-locked memory."""
        return StepInputs(
            micro_batches=tuple(item.pin_memory() for item in self.micro_batches),
            joined=tuple(step.pin_memory() for step in self.joined),
        )


class StepDataset(Dataset[MicroBatchInputs]):
    """A preference dataset whose items are micro-batches: ``dataset[micro_batch]``.

    Args:
        groups: The groups that micro-batches name.
        args: Mode and sharing.
        ahead: Collate the next steps in a thread while the current one trains.
        reads: Which hidden states the loss reads; those for log-probs if None.
        loss: What it reads of batches besides is made along with them; nothing if None.
    """

    def __init__(
        self,
        groups: PreferenceDataset,
        args: PreferenceTrainingArguments,
        *,
        ahead: bool = False,
        reads: Reads | None = None,
        loss: PreferenceLoss | None = None,
    ) -> None:
        self.groups = groups
        self.reads = reads
        self.loss = loss
        self.options = args.engine_options()
        self.shares = args.share_across_micro_batches
        self.min_shared_tokens = args.min_shared_tokens
        self.max_prefix_depth = args.max_prefix_depth
        self._prefetcher: Prefetcher[tuple[MicroBatch, ...], StepInputs] | None = None
        if ahead:
            self._prefetcher = Prefetcher()
        self._pins = ahead and pins_memory(args)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, micro_batch: MicroBatch) -> MicroBatchInputs:
        batch = collate(
            [self.groups[index] for index in micro_batch.group_indices],
            modes=() if self.options.runs_chunks else (self.options.mode,),
            min_shared_tokens=self.min_shared_tokens,
            max_depth=self.max_prefix_depth,
            reads=self.reads,
        )
        if self.loss is not None:
            with contextlib.suppress(InputError):  # the loss will say it again, where the user is told
                self.loss.prepare_batch(batch)
        return MicroBatchInputs(batch=batch, group_indices=micro_batch.group_indices, is_filler=micro_batch.is_filler)

    def __getitems__(self, step: PlannedStep) -> StepInputs:
        """The micro-batches of a whole step; DataLoader calls this with what the batch sampler yields."""
        if self._prefetcher is None:
            return self._collate_step(step)
        return self._prefetcher.get(self._collate_step, step, step.following)

    def _collate_step(self, step: tuple[MicroBatch, ...]) -> StepInputs:
        micro_batches = tuple(self[micro_batch] for micro_batch in step)
        joined: tuple[Step, ...] = ()
        if self.options.runs_chunks:
            joined = join_micro_batches([item.batch for item in micro_batches], self.options, shares=self.shares)
        inputs = StepInputs(micro_batches=micro_batches, joined=joined)
        return inputs.pin_memory() if self._pins else inputs


def join_micro_batches(batches: Sequence[Batch], options: EngineOptions, *, shares: bool) -> tuple[Step, ...]:
    """Plan the bounded schedule of a step: as one, or each micro-batch by itself."""
    parts = [batches] if shares else [[batch] for batch in batches]
    return tuple(
        join_batches(part, max_tokens_per_chunk=options.chunk_tokens, prefix_grad=options.prefix_grad) for part in parts
    )


def make_planner(
    groups: PreferenceDataset,
    args: PreferenceTrainingArguments,
    *,
    groups_per_device: int,
    shuffle: bool,
    cost_model: CostModel | None = None,
) -> StepPlanner:
    """Plan steps of ``groups_per_device * world_size`` groups, those that begin alike together.

    Args:
        groups: What to train on.
        args: Sizes, limits and the order.
        groups_per_device: Groups per step and rank.
        shuffle: Whether the order is random.
        cost_model: What ranks are balanced by, the same on every rank; see `make_cost_model`. Tokens if None.
    """
    lengths = groups.planned_lengths(args.min_shared_tokens, args.max_prefix_depth)
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
        clusters = groups.clusters(options.groups_per_step, args.min_shared_tokens)
    return StepPlanner(lengths, options, groups.group_ids, cost_model, clusters)


def make_cost_model(model: nn.Module) -> CostModel:
    """The FLOPs of a micro-batch under `model`, as yet unwrapped.

    FLOPs and not seconds: every rank must plan alike, and measured seconds differ. Call it before FSDP shards the
    model, when the sizes of the weights are still the same everywhere.
    """
    return CostModel.from_shape(model_shape(model))


def make_loader(
    groups: PreferenceDataset,
    planner: StepPlanner,
    args: PreferenceTrainingArguments,
    *,
    reads: Reads | None = None,
    loss: PreferenceLoss | None = None,
) -> DataLoader[Any]:
    """A loader whose items are one optimizer step's micro-batches for this rank.

    Args:
        groups: What is trained on.
        planner: Of its steps.
        args: Mode, sharing and workers.
        reads: As in `StepDataset`; for a loss's, see `kvpref.engine.passes.reads_of`.
        loss: As in `StepDataset`; left out of data workers that it cannot reach, and then makes its tensors itself.
    """
    if loss is not None and args.dataloader_num_workers > 0 and not _reaches_workers(loss):
        loss = None
    return DataLoader(
        StepDataset(groups, args, ahead=collates_ahead(args), reads=reads, loss=loss),
        batch_sampler=StepSampler(planner, rank=args.process_index),  # type: ignore[arg-type]
        collate_fn=_keep,  # type: ignore[arg-type]
        # In a data worker there is no device; without workers the thread that collates pins.
        pin_memory=args.dataloader_num_workers > 0 and pins_memory(args),
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


def _reaches_workers(loss: PreferenceLoss) -> bool:
    """Whether data workers know the loss, and what they make for it can be sent back.

    Other processes than forks of this one may not find the module of a user's loss; what is defined inside a function
    cannot be sent.
    """
    if multiprocessing.get_start_method() != "fork":
        return False
    try:
        pickle.dumps(loss)
    except Exception:  # whatever a user's loss raises
        return False
    return True


def collates_ahead(args: PreferenceTrainingArguments) -> bool:
    """Whether a thread collates ahead: unless data workers do."""
    return args.dataloader_num_workers == 0


def pins_memory(args: PreferenceTrainingArguments) -> bool:
    """Whether batches wait in page-locked memory, from which copies to CUDA do not hold up the host."""
    return bool(args.dataloader_pin_memory) and args.device.type == "cuda"


def _keep(step: StepInputs) -> StepInputs:
    return step


def select_groups(dataset: PreferenceDataset | list[Group], loss: PreferenceLoss) -> PreferenceDataset:
    """The dataset with the sequences that the loss reads; see `PreferenceLoss.prepare`."""
    groups = dataset if isinstance(dataset, PreferenceDataset) else PreferenceDataset(dataset)
    kind = type(loss)
    if kind.select is PreferenceLoss.select and kind.prepare is PreferenceLoss.prepare:
        return groups
    return PreferenceDataset(loss.prepare(groups), report=groups.report)


def check_lengths(dataset: PreferenceDataset, model: nn.Module) -> None:
    """Raise InputError for the first group with a sequence longer than the model's positions."""
    limit = getattr(unwrap(model).config, "max_position_embeddings", None)
    for group_id, lengths in zip(dataset.group_ids, dataset.lengths, strict=True):
        if limit is not None and lengths.max_sequence_tokens > limit:
            raise InputError(
                f"{group_id}: a sequence of {lengths.max_sequence_tokens} tokens is longer than the model's {limit} "
                "positions; set max_prompt_tokens and max_response_tokens to cut longer ones"
            )
