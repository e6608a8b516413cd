"""What log lines say of several ranks: sums, the largest peak, and how unequal the work is."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvpref.training import memory, meters
from kvpref.training.memory import MemoryMeter
from kvpref.training.meters import TokenMeter, WorkMeter


@pytest.fixture
def other_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Lets what is gathered be that of this rank, then of another one."""

    def set_other(other: Any) -> None:
        for module in (meters, memory):
            monkeypatch.setattr(module, "gather", lambda own, world_size: [own, other])

    return set_other


def batch(num_groups: int, num_total: int) -> Any:
    return SimpleNamespace(num_groups=num_groups, num_total_tokens=num_total)


def test_counts_are_sums_over_ranks(other_rank: Callable[[Any], None]) -> None:
    meter = TokenMeter()
    meter.add(batch(1, 20), 10, 10)
    other_rank(((3, 70, 100, 70), 2.0))  # it has trained more, in 2 seconds
    meter.gather(2)
    rates = meter.rates(2)
    assert rates["groups_per_second"] == pytest.approx((1 + 3) / 2.0)
    assert rates["unique_tokens_per_second"] == pytest.approx((10 + 70) / 2.0)
    assert rates["token_saving"] == pytest.approx(120 / 80)
    assert meter.token_saving == pytest.approx(120 / 80)
    # Until the next time, as if the other had done the same.
    meter.add(batch(2, 20), 10, 10)
    assert meter.rates(2)["groups_per_second"] == pytest.approx((4 + 2 * 2) / 2.0)


def test_ranks_that_train_a_group_together_count_once(other_rank: Callable[[Any], None]) -> None:
    meter = TokenMeter(ranks_per_group=2)
    meter.add(batch(3, 20), 10, 10)
    assert meter.rates(2)["token_saving"] == 2
    other_rank(((3, 10, 20, 10), 2.0))
    meter.gather(2)
    assert meter.rates(2)["groups_per_second"] == pytest.approx(3 / 2.0)


def test_memory_is_that_of_the_fullest_rank(other_rank: Callable[[Any], None]) -> None:
    meter = MemoryMeter(torch.device("cpu"))
    assert "peak_memory_rank" not in meter.pop(1)
    other_rank({"peak_memory_bytes": 1e18, "prefix_cache_bytes": 7.0})
    found = meter.pop(2)
    assert found == {"peak_memory_bytes": 1e18, "prefix_cache_bytes": 7.0, "peak_memory_rank": 1}


def test_imbalance_is_that_of_each_step(other_rank: Callable[[Any], None]) -> None:
    batcher: Any = SimpleNamespace(micro_batch_cost=lambda cost: cost)
    meter = WorkMeter(batcher)
    for costs in ([3.0, 1.0], [2.0]):
        meter.add(costs, seconds=1.0)  # type: ignore[arg-type]
    other_rank([(2.0, 0.5), (4.0, 1.5)])
    # 4 and 2 here, 2 and 4 there: as much over both steps, and yet each waits in one of them.
    found = meter.pop(2)
    assert found["rank_imbalance"] == pytest.approx(8 / 6)
    assert found["idle_seconds"] == pytest.approx(1.0 / 4 + 1.5 / 4)
    assert meter.pop(1) == {}
