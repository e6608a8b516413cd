"""Collating ahead: the same batches, whatever is skipped, dropped or raised."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from preference_runs import make_args, make_groups, make_model

import kvpref
from kvpref.data import PreferenceDataset, StepSampler
from kvpref.training.loading import loader as loading
from kvpref.training.loading.batcher import make_batcher, make_cost_model
from kvpref.training.loading.collation import StepDataset
from kvpref.training.loading.loader import make_loader
from kvpref.training.loading.prefetch import Prefetcher

NAME = "kvpref-prefetch"


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(NAME)]


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    gc.collect()
    deadline = time.monotonic() + 30
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


def test_what_follows_is_computed_ahead_in_one_thread_and_once():
    calls: list[tuple[int, str]] = []

    def square(key: int) -> int:
        calls.append((key, threading.current_thread().name))
        return key * key

    prefetcher: Prefetcher[int, int] = Prefetcher()
    keys = range(6)
    assert [prefetcher.get(square, key, keys[key + 1 : key + 3]) for key in keys] == [key * key for key in keys]
    assert sorted(key for key, _ in calls) == list(keys)
    assert {name for key, name in calls if key > 0} == {f"{NAME}_0"}


def test_no_more_than_what_follows_is_begun():
    begun, gate = [], threading.Event()

    def wait(key: int) -> int:
        begun.append(key)
        if key:
            gate.wait(1200)
        return key

    prefetcher: Prefetcher[int, int] = Prefetcher()
    prefetcher.get(wait, 0, (1, 2))
    # The iteration jumps: 1 runs already, 2 waits behind it and is not wanted any more.
    prefetcher.get(lambda key: key, 7, (8,))
    gate.set()
    assert prefetcher.get(wait, 8) == 8
    assert 2 not in begun


def test_errors_reach_the_consumer_at_their_item():
    def fail_at_two(key: int) -> int:
        if key == 2:
            raise ValueError(f"bad item {key}")
        return key

    prefetcher: Prefetcher[int, int] = Prefetcher()
    assert [prefetcher.get(fail_at_two, key, (key + 1, key + 2)) for key in (0, 1)] == [0, 1]
    with pytest.raises(ValueError, match="bad item 2"):
        prefetcher.get(fail_at_two, 2, (3,))
    assert prefetcher.get(fail_at_two, 3) == 3


@pytest.fixture
def loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same steps, collated ahead and not."""
    args = make_args(str(tmp_path))
    groups = PreferenceDataset(make_groups(20))
    batcher = make_batcher(groups, args, groups_per_device=3, shuffle=True)
    made = {}
    for ahead in (False, True):
        monkeypatch.setattr(loading, "collates_ahead", lambda _, ahead=ahead: ahead)
        made[ahead] = make_loader(groups, batcher, args)
    yield made
    made.clear()  # pytest holds on to what a test was given


def contents(step):
    return [(item.group_indices, item.is_filler, item.batch.plan("two_pass").targets.tolist()) for item in step]


def test_loader_gives_the_same_steps_ahead(loaders):
    for epoch in range(2):
        for loader in loaders.values():
            loader.batch_sampler.set_epoch(epoch)
        steps = [[contents(step) for step in loader] for loader in loaders.values()]
        assert steps[0] == steps[1]
        assert len(steps[0]) == len(loaders[True]) == 7
    assert isinstance(loaders[True].batch_sampler, StepSampler)


@pytest.mark.parametrize("skipped", [1, 4, 7])
def test_skipping_on_resume_is_exact_and_still_ahead(loaders, skipped):
    Accelerator(cpu=True)
    collated = []
    dataset = loaders[True].dataset
    original = dataset._collate_step
    dataset._collate_step = lambda step: collated.append(threading.current_thread().name) or original(step)
    expected = [contents(step) for step in loaders[False]][skipped:]
    assert [contents(step) for step in skip_first_batches(loaders[True], skipped)] == expected
    # Nothing is collated to be skipped, and all but the first step in the thread.
    assert len(collated) == len(expected)
    assert sum(name.startswith(NAME) for name in collated) == max(0, len(expected) - 1)


def test_dropped_iterator_leaves_no_trace_in_the_next(loaders):
    iterator = iter(loaders[True])
    first = contents(next(iterator))
    del iterator
    again = [contents(step) for step in loaders[True]]
    assert again == [contents(step) for step in loaders[False]]
    assert again[0] == first


def test_bad_group_stops_the_loop_at_its_step(loaders, monkeypatch):
    bad = list(loaders[True].batch_sampler)[3][0]
    original = StepDataset.__getitem__

    def fail(self, micro_batch):
        if micro_batch == bad:
            raise ValueError("cannot collate this")
        return original(self, micro_batch)

    monkeypatch.setattr(StepDataset, "__getitem__", fail)
    iterator = iter(loaders[True])
    for _ in range(3):
        next(iterator)
    with pytest.raises(ValueError, match="cannot collate this"):
        next(iterator)


def test_training_ahead_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = []
    for ahead in (False, True):
        monkeypatch.setattr(loading, "collates_ahead", lambda _, ahead=ahead: ahead)
        model = make_model()
        args = make_args(str(tmp_path / str(ahead)), loss="sft", max_steps=3)
        kvpref.PreferenceTrainer(model=model, args=args, train_dataset=make_groups(9)).train()
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *weights))


def test_no_thread_beside_data_workers(tmp_path: Path):
    assert loading.collates_ahead(make_args(str(tmp_path)))
    with_workers = make_args(str(tmp_path), dataloader_num_workers=1)
    assert not loading.collates_ahead(with_workers)


def test_batcher_balances_by_the_models_flops(tmp_path: Path):
    cost_model = make_cost_model(make_model(), "two_pass")
    assert cost_model.unit == "FLOPs"
    assert min(cost_model.per_token, cost_model.per_pair, cost_model.per_scored) > 0
    groups = PreferenceDataset(make_groups(4))
    args = make_args(str(tmp_path))
    batcher = make_batcher(groups, args, groups_per_device=4, shuffle=False, cost_model=cost_model)
    assert batcher.costs.cost_model == cost_model
