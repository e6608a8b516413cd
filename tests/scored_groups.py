"""Groups of any number of responses with scores, random log-probs for them, and both cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

import kvpref

Scores = tuple[float | None, ...]


def scored_batch(scores: Sequence[Scores], columns: Sequence[dict[str, Any]] | None = None) -> kvpref.Batch:
    """One group per entry, the responses of which have 1 to 4 scored tokens, in no order."""
    groups = []
    for index, group_scores in enumerate(scores):
        sequences = [
            kvpref.Sequence.from_prompt_and_response([1, 2], list(range(3, 4 + (3 * index + 2 * position) % 4)))
            for position in range(len(group_scores))
        ]
        own = {} if columns is None else columns[index]
        groups.append(kvpref.Group(sequences, scores=group_scores, id=f"file:{index + 1}", columns=own))
    return kvpref.collate(groups)


def random_logps(batch: kvpref.Batch, seed: int, scale: float = 2.0) -> kvpref.ResponseLogps:
    """float64 log-probs in (-scale, 0] that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    token_logps = -torch.rand(batch.num_scored_tokens, generator=generator, dtype=torch.float64) * scale
    return kvpref.ResponseLogps(token_logps.requires_grad_(), batch.cu_seqlens, batch.group_index)


def token_lists(logps: kvpref.ResponseLogps | None) -> list[list[float]]:
    """The log-probs of each sequence as numbers."""
    assert logps is not None
    return [part.tolist() for part in logps.token_logps.detach().split(logps.lengths().tolist())]


def group_slices(batch: kvpref.Batch) -> list[slice]:
    """The sequences of each group."""
    stops = [0]
    for group in batch.groups:
        stops.append(stops[-1] + len(group))
    return [slice(start, stop) for start, stop in pairwise(stops)]


def micro_batches(batch: kvpref.Batch, logps: Sequence[kvpref.ResponseLogps]) -> list[tuple[Any, ...]]:
    """A micro-batch for every group, and its part of each of the log-probs."""
    parts = []
    for group, rows in zip(batch.groups, group_slices(batch), strict=True):
        own = kvpref.collate([group])
        tokens = slice(int(batch.cu_seqlens[rows.start]), int(batch.cu_seqlens[rows.stop]))
        parts.append((own, *(_part(item, own, tokens) for item in logps)))
    return parts


def _part(logps: kvpref.ResponseLogps, own: kvpref.Batch, tokens: slice) -> kvpref.ResponseLogps:
    entropy = None if logps.entropy is None else logps.entropy[tokens]
    return kvpref.ResponseLogps(logps.token_logps[tokens], own.cu_seqlens, own.group_index, entropy=entropy)


def mean_over_units(outputs: Sequence[kvpref.LossOutput], units: Sequence[int]) -> kvpref.LossOutput:
    """What a step reports: losses and metrics of its micro-batches, weighted by their units."""

    def mean(values: list[torch.Tensor]) -> torch.Tensor:
        return sum(value * count for value, count in zip(values, units, strict=True)) / sum(units)

    return kvpref.LossOutput(
        mean([output.loss for output in outputs]),
        {name: mean([output.metrics[name] for output in outputs]) for name in outputs[0].metrics},
    )


def assert_same_output(found: kvpref.LossOutput, expected: kvpref.LossOutput, tolerance: float) -> None:
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.metrics, expected.metrics, rtol=0, atol=tolerance)
