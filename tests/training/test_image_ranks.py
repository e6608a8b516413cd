"""Ranks without images beside ranks with them."""

from pathlib import Path

import pytest
import torch
from image_runs import train_with_images
from two_processes import run_two_processes

import kvpref


@pytest.mark.full
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(("full", "cpo"), marks=pytest.mark.full),
        pytest.param(("bounded", "cpo"), marks=pytest.mark.full),
        ("full", "dpo", "full_shard"),
        pytest.param(("bounded", "dpo", "full_shard"), marks=pytest.mark.full),
    ],
)
def test_a_rank_without_images_trains_as_one_process_does(tmp_path: Path, run: tuple[str, ...]) -> None:
    run_two_processes(Path(__file__).with_name("image_ranks_worker.py"), tmp_path, *run)
    train_with_images(str(tmp_path), *run[:2])
    one, two = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "2.pt")
    assert any("visual" in name for name in one)
    for name, weight in one.items():
        assert torch.allclose(two[name], weight, rtol=0, atol=1e-10), name


def test_images_under_zero_3_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kvpref.training.checks.will_be_sharded", lambda: True)
    with pytest.raises(kvpref.InputError, match=r"train data hold images.*DistributedDataParallel"):
        train_with_images(str(tmp_path), "full")
