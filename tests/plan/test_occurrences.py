"""Counts per row of each pass: weighted sums over rows are sums over all tokens of all sequences."""

from __future__ import annotations

from collections import Counter

import pytest
from sample_groups import SCENARIOS

import kvpref
from kvpref.plan.modes import MODES
from kvpref.plan.occurrences import pass_counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scenario", ["five_levels", "identical_responses", "nothing_shared"])
def test_counts_weigh_each_token_id_as_the_sequences_do(scenario: str, mode: str) -> None:
    batch = kvpref.collate(SCENARIOS[scenario](), min_shared_tokens=1)
    found: Counter[tuple[int, int]] = Counter()
    passes = batch.plan(mode).passes
    for item, counts in zip(passes, pass_counts(batch, mode), strict=True):
        assert counts.shape == (1, item.input_ids.numel())
        rows = zip(item.input_ids.flatten().tolist(), item.position_ids.flatten().tolist(), strict=True)
        for row, count in zip(rows, counts[0].tolist(), strict=True):
            found[row] += int(count)
    expected = Counter((token, at) for sequence in batch.sequences for at, token in enumerate(sequence.input_ids))
    assert +found == expected
