"""A model and sampled groups, for commands that measure training steps. Imported only when one runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import kvpref
from kvpref.cli.given_data import GivenData
from kvpref.cli.loading import load_matching_processor, load_model
from kvpref.data import DataOptions, PreferenceDataset, StepBatcher, StepOptions
from kvpref.data.batching.budgets import default_budget
from kvpref.losses import PreferenceLoss
from kvpref.plan.sharing import DEFAULT_MIN_SHARED_TOKENS
from kvpref.records.groups import Group
from kvpref.training.loading.selection import check_lengths, select_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model_and_groups(
    model: str, data: GivenData, tokenizer: str | None, dtype: str, loss: PreferenceLoss | None = None
) -> tuple[PreTrainedModel, PreferenceDataset]:
    """The attached model and all groups of the data.

    Args:
        model: Folder, hub name, or a .json configuration for random weights.
        data: As the command line names it.
        tokenizer: None for the model's own.
        dtype: As for `load_model`.
        loss: What is to be computed, which says what the model is to have and which columns are read along; None for
            a loss of log-probs.

    Raises:
        InputError: If something cannot be loaded, or does not fit together.
    """
    folder, config = (None, model) if model.endswith(".json") else (model, None)
    reads = "tokens" if loss is None else loss.reads
    loaded = kvpref.attach(load_model(folder, config, dtype=dtype, reads=reads, may_add_head=reads == "ends"))
    options = DataOptions()
    if loss is not None:
        options = DataOptions(columns=loss.columns, trajectory_pairs=loss.reads_pairs)
    groups = data.load(load_matching_processor(tokenizer, folder, loaded), options)
    for line in () if groups.report is None else groups.report.notices:
        print(line, file=sys.stderr)
    return loaded, groups


def load_model_and_sample(
    model: str, data: GivenData, tokenizer: str | None, dtype: str, loss: PreferenceLoss, num_groups: int
) -> tuple[PreTrainedModel, PreferenceDataset]:
    """The attached model, and `num_groups` groups with only the sequences that the loss reads.

    Raises:
        InputError: As `load_model_and_groups`, and if a sequence is longer than the model's positions.
    """
    loaded, dataset = load_model_and_groups(model, data, tokenizer, dtype, loss)
    sampled = select_groups(sample_evenly(dataset, num_groups), loss)
    check_lengths(sampled, loaded)
    return loaded, sampled


def sample_evenly(dataset: PreferenceDataset, count: int) -> PreferenceDataset:
    """`count` groups at even distances, or all of them where there are fewer."""
    count = min(count, len(dataset))
    return PreferenceDataset((dataset[index * len(dataset) // count] for index in range(count)), report=dataset.report)


def cut_micro_batches(dataset: PreferenceDataset, mode: str, max_tokens: int | None) -> list[list[Group]]:
    """The micro-batches that the trainer makes of these groups, as one step.

    Args:
        dataset: At least one group.
        mode: Counts the tokens.
        max_tokens: Token budget of a micro-batch; None for the default.

    Raises:
        InputError: If a group alone exceeds the budget.
    """
    lengths = dataset.batching_lengths(DEFAULT_MIN_SHARED_TOKENS)
    options = StepOptions(
        groups_per_step=len(dataset),
        max_tokens_per_micro_batch=default_budget(lengths, mode) if max_tokens is None else max_tokens,
        mode=mode,  # type: ignore[arg-type]
        shuffle=False,
    )
    clusters = dataset.clusters(len(dataset), DEFAULT_MIN_SHARED_TOKENS)
    (step,) = StepBatcher(lengths, options, dataset.group_ids, clusters=clusters).steps()
    return [[dataset[index] for index in micro_batch.group_indices] for micro_batch in step[0]]
