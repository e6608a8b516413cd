"""What a model's own forward takes for one sequence, its images included."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from kvpref.models.both_ways import both_ways_of
from kvpref.models.vision.cross_attention import own_mask
from kvpref.models.vision.families import family_of
from kvpref.models.vision.tower import inputs_named_by
from kvpref.records.groups import Sequence
from kvpref.records.host_copies import to_device


def own_inputs(model: PreTrainedModel, sequence: Sequence) -> dict[str, Any]:
    """Keyword arguments of the model's forward for one sequence alone, on its device and in its dtype.

    Args:
        model: Attached or not.
        sequence: A sequence, with images only if the family takes them.
    """
    forward = type(model).forward
    names = inspect.signature(forward).parameters
    given: dict[str, Any] = {"input_ids": torch.tensor([sequence.input_ids])}
    if sequence.images:
        inputs = [placed.image.read() for placed in sequence.images]
        family = family_of(model)
        join = family.join if family.join_of_row is None else family.join_of_row
        given.update(inputs_named_by(forward, inputs, join))
        if family.cross_attention:
            given["cross_attention_mask"] = own_mask(sequence, inputs)
        if "mm_token_type_ids" in names:
            given["mm_token_type_ids"] = _types(sequence, sequence.image_runs)
    spans = both_ways_of(model.config).spans
    if spans == "prompts" and "token_type_ids" in names:
        given["token_type_ids"] = 1 - _types(sequence, sequence.prompt_runs)
    elif spans == "images" and "token_type_ids" in names:
        given["token_type_ids"] = _types(sequence, sequence.image_runs)
    return {name: _moved(value, model) for name, value in given.items()}


def _types(sequence: Sequence, runs: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """(1, T) int64, 1 inside the runs."""
    types = torch.zeros(1, len(sequence), dtype=torch.int64)
    for first, stop in runs:
        types[0, first:stop] = 1
    return types


def _moved(value: Any, model: PreTrainedModel) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return to_device(value.to(model.dtype) if value.is_floating_point() else value, model.device)
