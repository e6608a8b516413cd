"""Trees whose token ids say which token of which segment they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvpref.prefix.tree import NO_PARENT, PrefixTree, ranges


def with_unique_tokens(tree: PrefixTree, stride: int | None = None) -> PrefixTree:
    """Of the same shape; offset o of segment s is token ``s * stride + o``, without a stride its number in order."""
    numbers = np.arange(tree.num_segments)
    firsts = np.cumsum(tree.lengths) - tree.lengths if stride is None else numbers * stride
    held = tree.path_stops - tree.starts[tree.path_segments]
    ids = ranges(firsts[tree.path_segments], held)
    lengths = np.cumsum(list(map(len, tree.sequences)))
    return replace(tree, sequences=tuple(np.split(ids, lengths[:-1])))


def seen_by(tree: PrefixTree, segment: int) -> dict[int, int]:
    """What a segment sees of its ancestors: how many of the first tokens of each."""
    found = {}
    while tree.parents[segment] != NO_PARENT:
        parent = int(tree.parents[segment])
        found[parent] = int(tree.starts[segment] - tree.starts[parent])
        segment = parent
    return found
