"""Positions in models that give image tokens several axes (m-rope): the model's own positions, pass by pass.

Shape legend: A axes, B rows of T tokens in one pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel

from kvpref.models.backbone import backbone
from kvpref.models.vision.tower import inputs_named_by
from kvpref.plan.batch import ImageInputs
from kvpref.plan.passes import PassPlan, RowRun
from kvpref.records.groups import Sequence as TokenSequence
from kvpref.records.host_copies import to_device


class _Beginning(NamedTuple):
    """Positions up to the end of a sequence's last image, (A, L), and the next position after them, on every axis."""

    positions: torch.Tensor
    following: int


class ImagePositions:
    """The positions of sequences with images.

    Args:
        model: The model.
        sequences: The sequences of the batch or step.
        inputs: The tower's inputs by image key.
    """

    def __init__(
        self, model: PreTrainedModel, sequences: Sequence[TokenSequence], inputs: Mapping[str, ImageInputs]
    ) -> None:
        self._sequences, self._inputs = sequences, inputs
        self._function: Any = getattr(backbone(model), "get_rope_index", None)
        self._known: dict[Any, _Beginning] = {}
        self._of_sequence: dict[int, _Beginning] = {}

    def of_pass(self, item: PassPlan) -> torch.Tensor | None:
        """(A, B, T) int64 on the pass's device; None if a token's position is its place in the sequence."""
        if self._function is None or not any(sequence.images for sequence in self._sequences):
            return None
        with unset_fake_temporarily():  # the model's function reads tokens and sizes of images
            if item.row_runs:
                found = torch.cat([self._of_run(run) for run in item.row_runs], dim=1).unsqueeze(1)
            else:
                width = item.input_ids.shape[1]
                rows = [self._of_run((number, 0, width)) for number in range(len(self._sequences))]
                found = torch.stack(rows, dim=1)
        return to_device(found, item.input_ids.device)

    def _of_run(self, run: RowRun) -> torch.Tensor:
        """(A, stop - first) the positions of a run of a sequence's tokens, which may lie past its end."""
        number, first, stop = run
        sequence = self._sequences[number]
        if not sequence.images:
            return self._on_every_axis(first, stop)
        if number not in self._of_sequence:
            self._of_sequence[number] = self._beginning(sequence)
        positions, following = self._of_sequence[number]
        end = positions.shape[1]
        after = self._on_every_axis(following + max(first, end) - end, following + max(stop, end) - end)
        return torch.cat([positions[:, first : min(stop, end)], after], dim=1)

    def _on_every_axis(self, first: int, stop: int) -> torch.Tensor:
        return torch.arange(first, stop).expand(self._num_axes, -1)

    @property
    def _num_axes(self) -> int:
        if not self._known:
            self._beginning(next(sequence for sequence in self._sequences if sequence.images))
        return next(iter(self._known.values())).positions.shape[0]

    def _beginning(self, sequence: TokenSequence) -> _Beginning:
        end = sequence.images[-1].runs[-1][1]
        # One extra token shows where text continues; any token does if the sequence ends in an image.
        ids = (*sequence.input_ids, 0)[: end + 1]
        key = (ids, tuple(placed.image.key for placed in sequence.images))
        if key not in self._known:
            types = torch.zeros(1, len(ids), dtype=torch.int32)
            for placed in sequence.images:
                for first, stop in placed.runs:
                    types[0, first:stop] = 1
            given = inputs_named_by(self._function, [self._inputs[placed.image.key] for placed in sequence.images])
            row = torch.tensor([ids])
            known = {"input_ids": row, "mm_token_type_ids": types, "attention_mask": torch.ones_like(row)}
            names = inspect.signature(self._function).parameters
            given.update((name, value) for name, value in known.items() if name in names)
            found, _ = self._function(**given)
            self._known[key] = _Beginning(found[:, 0, :end], int(found[0, 0, end]))
        return self._known[key]
