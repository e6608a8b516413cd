"""TRL's tree rows as sequences: which tokens run, what is scored, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("trl", reason="needs the extra kvpref[trl]")

import agent_rows
import trl_tree_rows

from kvpref import InputError
from kvpref.integrations.trl.tree_rows import TreeRows

Row = dict[str, torch.Tensor]


@pytest.mark.parametrize("kind", agent_rows.KINDS)
def test_paths_are_the_samples_and_every_label_is_scored_once(kind: str) -> None:
    rows = agent_rows.KINDS[kind]()
    packed = trl_tree_rows.packed(rows)
    read = TreeRows.read(packed)
    distinct = {tuple(ids) for ids, _ in rows}
    assert {sequence.input_ids for sequence in read.batch.sequences} == distinct
    assert len(read.batch.sequences) == len(distinct)
    labelled = packed["shift_labels"] != -100
    assert sorted(read.places.tolist()) == labelled.nonzero().squeeze(1).tolist()
    targets = [token for sequence in read.batch.sequences for token in sequence.ids[sequence.flags]]
    assert packed["shift_labels"][read.places].tolist() == targets
    # TRL repeats the token before a branch.
    assert read.batch.num_unique_tokens <= len(packed["input_ids"])


def test_values_are_placed_where_they_are_predicted() -> None:
    read = TreeRows.read(trl_tree_rows.packed(agent_rows.attempts_that_branch()))
    values = torch.arange(1.0, 1 + len(read.places), requires_grad=True)
    placed = read.place(values)
    assert torch.equal(placed[read.places], values)
    assert int((placed != 0).sum()) == len(values)
    assert placed.sum().requires_grad


def shifted(name: str, place: int, by: int) -> Callable[[Row], Row]:
    def change(row: Row) -> Row:
        values = row[name].clone()
        values[place] += by
        return {**row, name: values}

    return change


def leaf_labelled(row: Row) -> Row:
    labels = row["shift_labels"].clone()
    labels[-1] = 7
    return {**row, "shift_labels": labels}


REFUSED: list[tuple[Callable[[Row], Row], str]] = [
    (lambda row: {name: row[name] for name in row if name != "tree_kv_index"}, "tree_kv_index missing"),
    (lambda row: {**row, "input_ids": row["input_ids"][None]}, r"input_ids of a tree row must have one dimension"),
    (lambda row: {**row, "shift_labels": row["shift_labels"][1:]}, "shift_labels must have one entry per token"),
    (shifted("tree_kv_index", 0, 1), "segment 0 of a tree row must end its path"),
    (shifted("tree_kv_index", -1, -1), "segment .* of a tree row must end its path"),
    (shifted("tree_cu_seqlens_q", -1, 1), "tree_cu_seqlens_q must rise from 0 to"),
    (shifted("tree_cu_seqlens_k", 0, 1), "tree_cu_seqlens_k must rise from 0 to"),
    (lambda row: {**row, "tree_cu_seqlens_k": row["tree_cu_seqlens_k"][1:]}, "one entry more than there are segments"),
    (shifted("position_ids", 3, 1), "position_ids of segment 0 .* count its path's tokens from 0"),
    (shifted("shift_labels", 20, 1), "must be the tokens that follow; position 20 has"),
    (leaf_labelled, "followed by -100"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_other_rows_are_refused(change: Callable[[Row], Row], message: str) -> None:
    row = trl_tree_rows.packed(agent_rows.attempts_that_branch())
    TreeRows.read(row)
    with pytest.raises(InputError, match=message):
        TreeRows.read(change(row))


def test_segments_behind_their_children_are_refused() -> None:
    """The path of a parent must stand before it is read."""
    row = {
        "input_ids": torch.tensor([5, 6, 7, 8]),
        "shift_labels": torch.full((4,), -100),
        "tree_kv_index": torch.tensor([2, 3, 0, 1, 2, 3]),
        "tree_cu_seqlens_q": torch.tensor([0, 2, 4]),
        "tree_cu_seqlens_k": torch.tensor([0, 4, 6]),
    }
    with pytest.raises(InputError, match="after the path of an earlier segment"):
        TreeRows.read(row)
