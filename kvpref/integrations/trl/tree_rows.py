"""Converts rows of TRL's AsyncGRPOTrainer, in which samples are folded into a trie, to a kvpref batch and back.

TRL keys a node of its trie on its token and the next one, so a row forks one token before its samples part, each node
has one label, and samples end on leaves. Its attention gathers keys and values of the whole path for each segment;
here the paths become sequences, and the prefix tree stores what they share once.

Shape legend: N tokens of a row in depth-first order; G segments; K entries of their paths, laid end to end; S of the N
positions that have a label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvpref.errors import InputError
from kvpref.integrations.trl.padded import IGNORED_LABEL
from kvpref.plan.batch import Batch, collate
from kvpref.plan.sharing import DEFAULT_MIN_SHARED_TOKENS
from kvpref.records.groups import Group, Sequence
from kvpref.records.host_copies import to_device

_TREE = ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")
NEEDED = ("input_ids", "shift_labels", *_TREE)
"""The tensors read from a row; the others are for the loss."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class TreeRows:
    """One row as a batch of the paths to its leaves."""

    batch: Batch
    """One sequence per leaf; each labelled position is scored in the first that passes through it."""

    places: torch.Tensor
    """(S,) int64: the position that predicts each scored token, on the batch's device."""

    num_tokens: int
    """N, the tokens of the row."""

    @classmethod
    def read(cls, row: Mapping[str, torch.Tensor], min_shared_tokens: int = DEFAULT_MIN_SHARED_TOKENS) -> TreeRows:
        """Find the paths and check that the row is what TRL makes.

        Args:
            row: Tensors by name, as `TreeRow.pack` returns them: ``input_ids`` (N,), ``shift_labels`` (N,) with -100
                where nothing is trained, ``tree_kv_index`` (K,), ``tree_cu_seqlens_q``, ``tree_cu_seqlens_k`` (G + 1,),
                and optionally ``position_ids`` (N,).
            min_shared_tokens: As in `kvpref.collate`.

        Raises:
            InputError: If a tensor is missing, or segments, positions or labels are not those of a trie.
        """
        missing = [name for name in NEEDED if name not in row]
        if missing:
            raise InputError(
                f"a tree row must have {', '.join(NEEDED)}, as TRL 1.16's TreeRow.pack returns them; "
                f"{', '.join(missing)} missing"
            )
        device = row["input_ids"].device
        ids, labels, *tree = (_on_host(name, row[name]) for name in NEEDED)
        paths = _leaf_paths(len(ids), tree, _on_host("position_ids", row.get("position_ids")))
        if len(labels) != len(ids):
            raise InputError(f"shift_labels must have one entry per token; got {len(labels)} for {len(ids)}")
        sequences, places = [], []
        taken = labels == IGNORED_LABEL
        for path in paths:
            own, before = ids[path], path[:-1]
            _check_labels(labels, path, own)
            scored = np.zeros(len(path), dtype=bool)
            scored[1:] = ~taken[before]
            taken[before] = True
            sequences.append(Sequence(own, scored))
            places.append(before[scored[1:]])
        batch = collate([Group(sequences)], device=device, min_shared_tokens=min_shared_tokens)
        return cls(batch=batch, places=to_device(torch.from_numpy(np.concatenate(places)), device), num_tokens=len(ids))

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """Spread (S,) values of scored tokens to (N,), each at the position that predicts it, 0 elsewhere."""
        # Stays in the graph even without scored tokens, so that a backward pass has one.
        return values.new_zeros(self.num_tokens).index_add(0, self.places, values)


def _on_host(name: str, values: torch.Tensor | None) -> Ints:
    if values is None:
        return np.zeros(0, dtype=np.int64)
    if values.ndim != 1:
        raise InputError(
            f"{name} of a tree row must have one dimension, as TreeRow.pack returns it; got shape {tuple(values.shape)}"
        )
    return values.cpu().numpy().astype(np.int64, copy=False)


def _leaf_paths(num_tokens: int, tree: Iterable[Ints], positions: Ints) -> list[Ints]:
    """The positions of each leaf's path from its root, in depth-first order."""
    index, cu_seqlens_q, cu_seqlens_k = tree
    ends = cu_seqlens_q[1:]
    if len(cu_seqlens_q) < 2 or len(cu_seqlens_k) != len(cu_seqlens_q):
        raise InputError(
            "tree_cu_seqlens_q and tree_cu_seqlens_k must have one entry more than there are segments; "
            f"got {len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        )
    for name, offsets, stop in (
        ("tree_cu_seqlens_q", cu_seqlens_q, num_tokens),
        ("tree_cu_seqlens_k", cu_seqlens_k, len(index)),
    ):
        if offsets[0] != 0 or offsets[-1] != stop or (np.diff(offsets) < 1).any():
            raise InputError(f"{name} must rise from 0 to {stop}; got {offsets.tolist()!s:.80}")
    paths = np.split(index, cu_seqlens_k[1:-1])
    segment_at = {int(end) - 1: number for number, end in enumerate(ends)}
    inner = set()
    for number, (path, first, stop) in enumerate(zip(paths, cu_seqlens_q[:-1], ends, strict=True)):
        above, own = path[: first - stop], path[first - stop :]
        parent = segment_at.get(int(above[-1])) if len(above) else None
        known = paths[parent] if parent is not None and parent < number else above[:0]
        if not np.array_equal(own, np.arange(first, stop)) or not np.array_equal(above, known):
            raise InputError(f"segment {number} of a tree row must end its path, after the path of an earlier segment")
        if len(positions) and not np.array_equal(positions[own], np.arange(len(above), len(path))):
            raise InputError(f"position_ids of segment {number} of a tree row must count its path's tokens from 0")
        inner |= {parent}
    return [path for number, path in enumerate(paths) if number not in inner]


def _check_labels(labels: Ints, path: Ints, ids: Ints) -> None:
    """Check that each label is the token that follows on the path, and that a leaf's last token has none."""
    targets = np.append(ids[1:], IGNORED_LABEL)
    wrong = (labels[path] != IGNORED_LABEL) & (labels[path] != targets)
    if wrong.any():
        place = int(path[wrong.argmax()])
        raise InputError(
            f"shift_labels of a tree row must be the tokens that follow; position {place} has {labels[place]}, "
            f"followed by {targets[wrong.argmax()]}"
        )
