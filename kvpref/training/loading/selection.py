"""Selects the sequences that the loss reads, and checks that they fit the model."""

from __future__ import annotations

from torch import nn

from kvpref.data import PreferenceDataset
from kvpref.errors import InputError
from kvpref.losses import PreferenceLoss
from kvpref.models.support import unwrap
from kvpref.records.groups import Group


def select_groups(dataset: PreferenceDataset | list[Group], loss: PreferenceLoss) -> PreferenceDataset:
    """The dataset with the sequences that the loss reads; see `PreferenceLoss.prepare`."""
    groups = dataset if isinstance(dataset, PreferenceDataset) else PreferenceDataset(dataset)
    kind = type(loss)
    if kind.select is PreferenceLoss.select and kind.prepare is PreferenceLoss.prepare:
        return groups
    return PreferenceDataset(loss.prepare(groups), report=groups.report)


def check_lengths(dataset: PreferenceDataset, model: nn.Module) -> None:
    """Raise InputError for the first group with a sequence longer than the model allows."""
    limit = getattr(unwrap(model).config, "max_position_embeddings", None)
    for group_id, lengths in zip(dataset.group_ids, dataset.lengths, strict=True):
        if limit is not None and lengths.max_sequence_tokens > limit:
            raise InputError(
                f"{group_id}: a sequence of {lengths.max_sequence_tokens} tokens is longer than the model's {limit} "
                "positions; set max_prompt_tokens and max_response_tokens to cut longer ones"
            )
