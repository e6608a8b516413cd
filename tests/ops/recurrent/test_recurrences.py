"""A recurrence over the segments of a tree is that over whole sequences, with all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recurrent_trees import assert_same_recurrence, random_tree
from torch.nn import functional

from kvpref.ops.recurrent import decayed_attention, segment_convolution, selective_scan

# Sums of up to 120 terms in another order.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.fixture(params=TOLERANCES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def _normal(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_taps", [2, 4])
def test_convolution(seed: int, num_taps: int, dtype: torch.dtype) -> None:
    tree = random_tree(seed)
    rows = _normal(tree.num_unique_tokens, 3, dtype=dtype, seed=1)
    weight = _normal(3, 1, num_taps, dtype=dtype, seed=2)

    def convolve(wide: torch.Tensor) -> torch.Tensor:
        return functional.conv1d(functional.pad(wide, (num_taps - 1, 0)), weight, groups=3)

    def advance(segments: Any, tensors: Any, windows: Any) -> Any:
        out, left = segment_convolution(segments, tensors[0].T, windows, num_taps, convolve)
        return out.T, left

    def whole(tensors: Any) -> torch.Tensor:
        return convolve(tensors[0].T.unsqueeze(0))[0].T

    assert_same_recurrence(tree, (rows,), (weight,), advance, whole, TOLERANCES[dtype])


@pytest.mark.parametrize("seed", range(6))
def test_selective_scan(seed: int, dtype: torch.dtype) -> None:
    tree = random_tree(seed)
    num_rows = tree.num_unique_tokens
    tensors = tuple(_normal(num_rows, size, dtype=dtype, seed=size) for size in (3, 3, 2, 2))
    decay = _normal(3, 2, dtype=dtype, seed=9)

    def advance(segments: Any, rows: Any, states: Any) -> Any:
        x, steps, b, c = rows
        return segments.scan(
            lambda padded, initial: selective_scan(padded[0], padded[1], -decay.exp(), *padded[2:], initial),
            (x, functional.softplus(steps), b, c),
            states,
        )

    def whole(rows: Any) -> torch.Tensor:
        x, steps, b, c = rows
        state, outs = torch.zeros(3, 2, dtype=dtype), []
        for i, step in enumerate(functional.softplus(steps)):
            state = (-decay.exp() * step[:, None]).exp() * state + (step * x[i])[:, None] * b[i]
            outs.append(state @ c[i])
        return torch.stack(outs)

    assert_same_recurrence(tree, tensors, (decay,), advance, whole, TOLERANCES[dtype])


@pytest.mark.parametrize("seed", range(6))
def test_decayed_attention(seed: int, dtype: torch.dtype) -> None:
    tree = random_tree(seed, longest=90)  # more than one block
    tensors = tuple(_normal(tree.num_unique_tokens, 2, 3, dtype=dtype, seed=i) for i in range(3))
    slopes = torch.tensor([0.02, 0.7], dtype=dtype)

    def advance(segments: Any, rows: Any, states: Any) -> Any:
        is_token = slopes.new_ones(len(rows[0]))
        return segments.scan(
            lambda padded, initial: decayed_attention(*padded[:3], slopes, padded[3], initial),
            (*rows, is_token),
            states,
        )

    def whole(rows: Any) -> torch.Tensor:
        state, outs = torch.zeros(2, 3, 3, dtype=dtype), []
        for query, key, value in zip(*rows, strict=True):
            state = (-slopes).exp()[:, None, None] * state + key.unsqueeze(-1) * value.unsqueeze(-2)
            outs.append((query.unsqueeze(-2) @ state).squeeze(-2))
        return torch.stack(outs)

    assert_same_recurrence(tree, tensors, (), advance, whole, TOLERANCES[dtype])


def test_padding_is_bounded() -> None:
    """Rows of very unlike lengths run in several calls, each with little padding, and come back in order."""
    from kvpref.ops.recurrent import SegmentRows
    from kvpref.prefix.segments import SegmentLayout

    lengths = (3, 500, 90, 480, 1, 100)
    layout = SegmentLayout(lengths=lengths, parents=(0, 0, 1, 1, -1, 2), kept=(1, 4, 5))
    segments = SegmentRows(layout, torch.device("cpu"))
    shapes = []

    def step(rows: Any, initial: torch.Tensor) -> Any:
        shapes.append(tuple(rows[0].shape))
        summed = rows[0].cumsum(1) + initial.unsqueeze(1)
        return summed, initial + rows[0].sum(1)

    rows = torch.arange(sum(lengths), dtype=torch.float64)
    before = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    out, final = segments.scan(step, (rows,), before)
    parts = rows.split(lengths)
    begins = (10.0, 10.0, 20.0, 20.0, 0.0, 30.0)
    assert torch.equal(out, torch.cat([part.cumsum(0) + begin for part, begin in zip(parts, begins, strict=True)]))
    assert final is not None
    assert final.tolist() == [float(parts[i].sum()) + begins[i] for i in (1, 4, 5)]
    assert sum(rows * width for rows, width in shapes) <= 1.25 * sum(lengths) + 2 * 63
    assert len(shapes) == 3
