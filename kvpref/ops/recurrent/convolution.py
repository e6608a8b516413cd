"""Short causal convolutions over segments that start from their parents' last columns.

Shape legend: T rows of a level, S segments, K of them kept, C channels, W taps of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvpref.ops.recurrent.rows import SegmentRows

Convolve = Callable[[torch.Tensor], torch.Tensor]
"""A causal convolution over (1, C, any length), with zeros before the first column."""


def segment_convolution(
    segments: SegmentRows, rows: torch.Tensor, windows: torch.Tensor | None, num_taps: int, convolve: Convolve
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Convolve every segment as if its ancestors stood before it.

    Before each segment stand the W - 1 columns that its parent left, or zeros; so one call convolves the whole row.

    Args:
        segments: The segments of the level.
        rows: (C, T), the input.
        windows: (P, C, W - 1), the last columns that earlier segments left.
        num_taps: W, the width of the convolution.
        convolve: The convolution.

    Returns:
        The output (C, T), and the last W - 1 columns (K, C, W - 1) of kept segments; None if there are none.
    """
    before = num_taps - 1
    places = torch.arange(rows.shape[1], device=rows.device) + before * (segments.segment_of + 1)
    num_segments = len(segments.layout.lengths)
    wide = rows.new_zeros(rows.shape[0], rows.shape[1] + before * num_segments).index_copy(1, places, rows)
    columns = torch.arange(before, device=rows.device)
    initial = segments.begin(windows)
    if initial is not None:
        numbers = torch.arange(num_segments, device=rows.device)
        into = (segments.starts + before * numbers).unsqueeze(1) + columns
        wide = wide.index_copy(1, into.flatten(), initial.transpose(0, 1).flatten(1).to(wide.dtype))
    out = convolve(wide.unsqueeze(0))[0].index_select(1, places)
    if not segments.num_kept:
        return out, None
    last = (segments.kept_ends + before * segments.kept).unsqueeze(1) + columns
    final = wide.index_select(1, last.flatten()).unflatten(1, last.shape).transpose(0, 1)
    return out, final.contiguous()
