"""Random trees of segments, and recurrences over them beside whole sequences."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch

from kvpref.ops.recurrent import SegmentRows
from kvpref.prefix.levels import build_levels
from kvpref.prefix.segments import level_segments
from kvpref.prefix.tree import NO_PARENT, PrefixTree

Rows = tuple[torch.Tensor, ...]

Advance = Callable[[SegmentRows, Rows, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]]
"""As a mixer runs it: a level's segments, their rows, the states left before."""

Whole = Callable[[Rows], torch.Tensor]
"""Of one whole sequence alone."""


def random_tree(seed: int, *, num_levels: int = 3, longest: int = 40) -> PrefixTree:
    """Segments of 1 to `longest` tokens, some of them without children, each a leaf's or a parent of 1 to 3."""
    generator = random.Random(seed)
    segments: list[tuple[int, int, int, int]] = []  # parent, depth, start, length
    paths: list[tuple[int, ...]] = []

    def grow(path: tuple[int, ...], depth: int, start: int) -> None:
        length = generator.choice((1, generator.randint(1, longest)))
        here = (*path, len(segments))
        segments.append((path[-1] if path else NO_PARENT, depth, start, length))
        num_children = 0 if depth + 1 == num_levels else generator.choice((0, 1, 2, 3)) if depth else 2
        for _ in range(num_children):
            grow(here, depth + 1, start + length)
        if not num_children:
            paths.append(here)

    for _ in range(2):
        grow((), 0, 0)
    parents, depths, starts, lengths = np.array(segments).T
    return PrefixTree(
        sequences=tuple(np.arange(lengths[list(path)].sum()) for path in paths),
        parents=parents,
        depths=depths,
        starts=starts,
        lengths=lengths,
        sources=np.array([next(i for i, path in enumerate(paths) if index in path) for index in range(len(segments))]),
        path_segments=np.array([index for path in paths for index in path]),
        path_offsets=np.cumsum([0, *map(len, paths)]),
    )


def over_levels(tree: PrefixTree, tensors: Rows, advance: Advance) -> list[torch.Tensor]:
    """Per segment, its output; `tensors` hold all segments' rows, in the tree's order."""
    levels = build_levels(tree)
    per_segment = [tensor.split(list(map(len, tree.segments))) for tensor in tensors]
    outs: list[torch.Tensor] = [torch.empty(0)] * len(tree.segments)
    states = None
    for level, layout in zip(levels, level_segments(tree, levels), strict=True):
        rows = tuple(torch.cat([parts[index] for index in level.segments]) for parts in per_segment)
        out, states = advance(SegmentRows(layout, tensors[0].device), rows, states)
        assert (states is None) == (not layout.kept)
        for index, part in zip(level.segments, out.split(layout.lengths), strict=True):
            outs[index] = part
    return outs


def over_sequences(tree: PrefixTree, tensors: Rows, whole: Whole) -> list[torch.Tensor]:
    """The same from whole sequences, each alone; of segments that several share, from the first of them."""
    per_segment = [tensor.split(list(map(len, tree.segments))) for tensor in tensors]
    outs: list[torch.Tensor] = [torch.empty(0)] * len(tree.segments)
    for path in reversed(tree.paths):
        out = whole(tuple(torch.cat([parts[index] for index in path]) for parts in per_segment))
        for index, part in zip(path, out.split([len(tree.segments[index]) for index in path]), strict=True):
            outs[index] = part
    return outs


def assert_same_recurrence(
    tree: PrefixTree, tensors: Rows, parameters: Rows, advance: Advance, whole: Whole, tolerance: float
) -> None:
    """Outputs and the gradients of all tensors agree, relative to their norms."""
    leaves = (*tensors, *parameters)
    found, truth = over_levels(tree, tensors, advance), over_sequences(tree, tensors, whole)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(item.shape, generator=generator, dtype=torch.float64) for item in truth]
    grads = []
    for outs in (found, truth):
        loss = sum((out.double() * weight).sum() for out, weight in zip(outs, weights, strict=True))
        grads.append(torch.autograd.grad(loss, leaves))
    for one, other in zip([torch.cat(found), *grads[0]], [torch.cat(truth), *grads[1]], strict=True):
        error = (one - other).double().norm() / other.double().norm()
        assert error < tolerance, float(error)
