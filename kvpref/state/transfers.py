"""Transfers between host memory and the device, shared by all chunks of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from kvpref.plan.chunks import ChunkPlan
from kvpref.state.device_buffers import Buffers, room
from kvpref.state.host_slabs import HostLayer
from kvpref.state.lanes import lanes_of


class Transfers:
    """Lanes, and buffers large enough for any layer of any chunk, created when first needed.

    Args:
        device: The model's device.
        chunks: All chunks that will run.
    """

    def __init__(self, device: torch.device, chunks: Iterable[ChunkPlan]) -> None:
        self.device, self.lanes = device, lanes_of(device)
        self._rows_read = self._rows_summed = self._most_parts = 0
        for chunk in chunks:
            num_read = sum(place.stop - place.start for place in chunk.reads)
            num_own = 0 if chunk.writes is None else chunk.num_tokens
            self._rows_read = max(self._rows_read, num_read)
            self._rows_summed = max(self._rows_summed, num_read + num_own)
            self._most_parts = max(self._most_parts, 2 * len(chunk.reads) + 2)
        self._key_values: Buffers | None = None
        self._sums: Buffers | None = None

    def key_values(self, layers: Sequence[HostLayer]) -> Buffers:
        """Buffers for the keys and values that a layer reads.

        Args:
            layers: The layers of any chunk; a row has the same size in all chunks.
        """
        if self._key_values is None:
            row_bytes = max(sum(rows.row_bytes for rows in layer[:2]) for layer in layers)
            size = room(self._rows_read * row_bytes, self._most_parts)
            # Compute reads the buffers and wrote what is copied there.
            self._key_values = Buffers(self.lanes, size, self.device, "prefix K/V", [self.lanes.compute])
        return self._key_values

    def sums(self, layers: Sequence[HostLayer]) -> Buffers:
        """Buffers for the sums of gradients that a layer takes up or adds to.

        Args:
            layers: As in `key_values`.
        """
        if self._sums is None:
            row_bytes = max(sum(rows.row_sum_bytes for rows in layer[:2]) for layer in layers)
            size = room(self._rows_summed * row_bytes, self._most_parts)
            # Compute reads and writes the buffers; what is copied there came from `down`.
            after = [self.lanes.compute, self.lanes.down]
            self._sums = Buffers(self.lanes, size, self.device, "prefix K/V gradients", after)
        return self._sums

    def close(self) -> None:
        """Free the buffers; compute, which may get their memory, first waits for the copies."""
        if self._key_values is not None or self._sums is not None:
            self.lanes.compute.wait(self.lanes.up.record())
            self.lanes.compute.wait(self.lanes.down.record())
        self._key_values = self._sums = None
