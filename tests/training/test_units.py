"""Steps and micro-batches without any unit of the loss: groups whose responses are all alike, say."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import host_waits
import pytest
import torch
from preference_runs import make_args, make_groups, make_model
from transformers import TrainerCallback

import kvpref
from kvpref import Group
from kvpref.training.meters import MetricMeter
from kvpref.training.units import shares, sum_over_ranks, weighted


def scored(groups: list[Group], scores: list[float]) -> list[Group]:
    return [Group(group.sequences, scores=scores, id=group.id) for group in groups]


@pytest.mark.parametrize("schedule", ["full", "bounded"])
def test_a_step_without_units_changes_nothing(tmp_path: Path, schedule: str) -> None:
    """One group per step, and one of two has something to learn: one step of two changes the weights."""
    model, groups = make_model(), make_groups(2)
    seen = [weights_of(model)]

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(weights_of(model))

    args = make_args(str(tmp_path), loss="all_pairs", schedule=schedule, per_device_train_batch_size=1)
    data = scored(groups[:1], [1.0, 1.0]) + scored(groups[1:], [0.0, 1.0])
    kvpref.PreferenceTrainer(model, args, train_dataset=data, callbacks=[Watch()]).train()
    assert sorted(torch.equal(old, new) for old, new in pairwise(seen)) == [False, True]


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_groups_without_units_do_not_weigh(tmp_path: Path) -> None:
    """The same update as without them, however the micro-batches fall."""
    groups = make_groups(6)
    useful, useless = scored(groups[:3], [0.0, 1.0]), scored(groups[3:], [1.0, 1.0])
    weights = []
    for name, data in (("alone", useful), ("together", useful + useless)):
        model = make_model()
        args = make_args(str(tmp_path / name), loss="all_pairs", max_steps=1, per_device_train_batch_size=len(data))
        kvpref.PreferenceTrainer(model, args, train_dataset=data).train()
        weights.append(weights_of(model))
    assert (weights[0] - weights[1]).abs().max() <= 1e-12  # float64
    logs = [json.loads(line) for line in (tmp_path / "together" / "metrics.jsonl").read_text().splitlines()]
    assert any("rewards/accuracies" in line or "rewards/accuracy" in line for line in logs), logs


def test_metrics_are_means_over_what_has_them() -> None:
    meter = MetricMeter()
    meter.add({"kl": torch.tensor(1.0), "rewards/chosen": torch.tensor(4.0)}, 1)
    meter.add({"kl": torch.tensor(2.0)}, 3)
    meter.add({"kl": torch.tensor(9.0), "rewards/rejected": torch.tensor(5.0)}, 0)
    assert meter.pop(1) == {"kl": 1.75, "rewards/chosen": 4.0}
    assert meter.pop(1) == {}


class TwoRanks:
    """An accelerator whose other rank counts twice as much."""

    num_processes = 2
    device = torch.device("cpu")

    def reduce(self, count: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return 3 * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [7, 0])
def test_shares_of_several_ranks_are_the_same_bits_and_are_not_read(count: int, dtype: torch.dtype) -> None:
    loss = torch.tensor(0.3, dtype=dtype)
    accelerator: Any = TwoRanks()
    with host_waits.refused("cpu"):
        total = sum_over_ranks(accelerator, count)
        found = [weighted(loss, share) for share in shares([2, 5], total, 2)]
    expected = [loss * (2 * 2 / max(1, 3 * count)), loss * (5 * 2 / max(1, 3 * count))]
    assert all(map(torch.equal, found, expected))
    assert {value.dtype for value in found} == {dtype}
