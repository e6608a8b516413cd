"""How often each row of a pass occurs in the sequences, as tensors, built only on request.

Shape legend: M micro-batches, T rows of a pass.
"""

from __future__ import annotations

import torch

from kvpref.plan.batch import Batch
from kvpref.prefix.occurrences import Occurrences, tree_occurrences
from kvpref.records.host_copies import to_device


def row_counts(occurrences: Occurrences, device: torch.device) -> torch.Tensor:
    """(M, T) float32, how many of each owner's sequences hold each row."""
    counts = torch.tensor(occurrences.counts, dtype=torch.float32)
    return to_device(counts.repeat_interleave(torch.tensor(occurrences.lengths), dim=1), device)


def pass_counts(batch: Batch, mode: str) -> tuple[torch.Tensor, ...]:
    """Per pass of a mode, (1, B * T) float32: how many sequences hold each row; 0 for padding."""
    passes = batch.plan(mode).passes
    sizes = [item.input_ids.numel() for item in passes]
    if passes[0].attention_mask is not None:
        return tuple(
            item.attention_mask.reshape(1, -1).to(torch.float32) for item in passes if item.attention_mask is not None
        )
    if sum(sizes) == batch.num_total_tokens:  # nothing is shared
        return tuple(torch.ones(1, size, device=batch.device) for size in sizes)
    return row_counts(tree_occurrences(batch.tree), batch.device).split(sizes, dim=1)
