"""The integers of `shared_prefix`: where tokens stand, what rows share, and the way back to rows and columns."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from padded_batches import one_prompt, padded, sharing_rows

from kvpref.integrations.shared_prefix.padded_rows import PaddedRows, UnservedError, share_rows
from kvpref.prefix.building import build_tree


def read(rows: list[list[int]], side: str = "right", extra: int = 1, first: int | None = None) -> PaddedRows:
    """Rows as padded; with `first`, positions of every row count from there."""
    inputs = padded(rows, side, extra)
    mask = inputs["attention_mask"]
    positions = None if first is None else (mask.cumsum(dim=1) - 1 + first).numpy()
    return PaddedRows.read(inputs["input_ids"].numpy(), mask.numpy(), positions)


def random_rows(seed: int) -> list[list[int]]:
    """From an alphabet of two, so that everything is shared somewhere; some rows twice."""
    generator = random.Random(seed)
    rows = [[generator.choice((5, 6)) for _ in range(generator.randint(1, 9))] for _ in range(7)]
    return rows + rows[:2]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("seed", range(20))
def test_shared_tokens_are_those_of_the_radix_tree(seed: int, side: str) -> None:
    rows = random_rows(seed)
    tree = build_tree([tuple(row) for row in rows])
    expected = sum(map(len, rows)) - tree.num_unique_tokens
    assert read(rows, side).num_shared_tokens(by_position=False) == expected
    assert read(rows, side, first=3).num_shared_tokens(by_position=True) == expected


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("seed", range(20))
def test_every_cell_finds_its_token_and_position(seed: int, side: str, by_position: bool) -> None:
    rows = random_rows(seed)
    found = read(rows, side)
    shared = share_rows(found, by_position=by_position, min_shared_tokens=1, max_depth=4)
    inputs = padded(rows, side)
    real = inputs["attention_mask"].bool()
    cells = shared.unique_rows.view(shared.shape)
    assert (cells[~real] == shared.num_unique_tokens).all()
    assert torch.equal(shared.item.input_ids[0][cells[real]], inputs["input_ids"][real])
    columns = torch.arange(real.shape[1]).expand(real.shape)
    expected = columns if by_position else columns - torch.from_numpy(found.starts)[:, None]
    assert torch.equal(shared.item.position_ids[0][cells[real]], expected[real])
    assert shared.item.input_ids.shape == (1, shared.num_unique_tokens)
    assert shared.num_unique_tokens <= sum(map(len, rows))


def test_a_row_attends_to_its_own_tokens_only() -> None:
    """Walk from each cell through the blocks of the pass: what it sees is its row up to itself."""
    rows = sharing_rows()
    shared = share_rows(read(rows), by_position=False, min_shared_tokens=1, max_depth=4)
    ids = shared.item.input_ids[0].tolist()
    seen: dict[int, list[int]] = {}
    level_starts = [0]
    for level in shared.item.levels:
        start = level_starts[-1]
        for row in range(level.num_rows):
            keys: list[int] = []
            for block in (*level.blocks[1:], level.blocks[0]):
                key_start = level_starts[block.source - 1]
                for q0, q1, k0, k1 in block.pairs:
                    if q0 <= row < q1:
                        keys += range(key_start + k0, key_start + (row - q0 + k0 + 1 if block.causal else k1))
            seen[start + row] = [ids[key] for key in keys]
        level_starts.append(start + level.num_rows)
    cells = shared.unique_rows.view(shared.shape)
    for index, row in enumerate(rows):
        for column in range(len(row)):
            assert seen[int(cells[index, column])] == row[: column + 1]


def test_learned_positions_keep_rows_in_other_columns_apart() -> None:
    rows = [*one_prompt(2, 10), [*one_prompt(1, 10)[0], 99]]  # lengths 13, 14, 14
    found = read(rows, "left")
    assert found.starts.tolist() == [2, 1, 1]
    assert found.num_shared_tokens(by_position=False) == 10 + 13
    assert found.num_shared_tokens(by_position=True) == 10
    assert share_rows(found, by_position=True, min_shared_tokens=1, max_depth=4).num_unique_tokens == 13 + 18


@pytest.mark.parametrize("columns", [[], [2]], ids=["an empty row", "a gap"])
def test_masks_that_are_not_one_run_are_unserved(columns: list[int]) -> None:
    mask = np.ones((2, 5), dtype=np.int64)
    mask[1, columns or slice(None)] = 0
    with pytest.raises(UnservedError, match="gaps or empty rows"):
        PaddedRows.read(np.ones((2, 5), dtype=np.int64), mask, None)


def test_masks_may_be_booleans() -> None:
    mask = padded(one_prompt())["attention_mask"].numpy().astype(bool)
    assert PaddedRows.read(np.ones(mask.shape, dtype=np.int64), mask, None).lengths.tolist() == [43, 44, 45, 46]


def test_positions_at_padding_do_not_matter() -> None:
    found = read(one_prompt(), "left", first=5)  # they are 4 there, again and again
    assert found.first_positions.tolist() == [5] * 4


def test_positions_that_jump_are_unserved() -> None:
    ids = np.ones((2, 5), dtype=np.int64)
    with pytest.raises(UnservedError, match="count up by one"):
        PaddedRows.read(ids, None, np.array([[0, 1, 2, 4, 5]]))
