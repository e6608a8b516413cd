"""Shares of a pass: together they are the pass, padding aside, and each predictor row is read once."""

from __future__ import annotations

import pytest
import torch
from sample_groups import SCENARIOS

import kvpref
from kvpref.plan.shares import joined_reads, share_of


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_shares_are_the_pass(scenario: str, num_ranks: int) -> None:
    batch = kvpref.collate(SCENARIOS[scenario](), min_shared_tokens=1)
    plan = batch.plan("two_pass")
    shares = [[share_of(item, rank, num_ranks) for item in plan.passes] for rank in range(num_ranks)]
    for depth, item in enumerate(plan.passes):
        num_tokens = item.input_ids.shape[1]
        for name in ("input_ids", "position_ids"):
            rows = torch.cat([getattr(own[depth].item, name) for own in shares], dim=1)
            assert torch.equal(rows[:, :num_tokens], getattr(item, name))
            assert not rows[:, num_tokens:].any()
            assert rows.shape[1] - num_tokens < num_ranks
        assert all(own[depth].item.levels is item.levels for own in shares)
    # What each rank reads, after all ranks' hidden rows (here: their numbers in the passes) were gathered.
    tokens = [torch.arange(item.input_ids.shape[1]) for item in plan.passes]
    counts = [len(item.predictor_rows) for item in plan.passes]
    held = [
        torch.cat([share.rows(rows)[share.item.predictor_rows] for share, rows in zip(own, tokens, strict=True)])
        for own in shares
    ]
    reads, places = zip(*(joined_reads(own, counts) for own in shares), strict=True)
    assert all(torch.equal(other, places[0]) for other in places)
    expected = torch.cat([item.predictor_rows for item in plan.passes])
    assert torch.equal(torch.cat(held)[places[0]], expected)
    assert torch.equal(torch.cat([plan.targets[own] for own in reads])[places[0]], plan.targets)


def test_all_ranks_read_as_many_rows() -> None:
    item = kvpref.collate(SCENARIOS["pairs"](), min_shared_tokens=1).plan("two_pass").passes[0]
    sizes = {len(share_of(item, rank, 5).item.predictor_rows) for rank in range(5)}
    assert len(sizes) == 1


def test_what_moves_to_a_device_is_planned_on_the_host() -> None:
    plan = kvpref.collate(SCENARIOS["pairs"]()).to("meta").plan("two_pass")
    share = share_of(plan.passes[0], 0, 2)
    assert share.item.input_ids.device.type == "meta"
    assert share.reads.device.type == "cpu"
