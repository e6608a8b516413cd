"""What a loss reads of its batches is made in collation, never in the step; what it lacks is told as before."""

from __future__ import annotations

import multiprocessing
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from preference_runs import make_args, make_groups, make_model

import kvpref
from kvpref.losses import PreferenceLoss
from kvpref.training.loading import loader as loading

BUILDS: list[tuple[str, str]] = []
"""The groups built for, and what was being done."""

MISSING = "made:7: this group has nothing that can be read"


def weights_of(groups: tuple[kvpref.Group, ...], missing: str) -> torch.Tensor:
    BUILDS.append((str(groups[0].id), CountingLoss.phase))
    for group in groups:
        if group.id == missing:
            raise kvpref.InputError(MISSING)
    return torch.ones(len(groups))


@dataclass(frozen=True, kw_only=True)
class CountingLoss(PreferenceLoss):
    """A mean over pairs whose weights are counted."""

    missing: str = ""

    phase: ClassVar[str] = "collation"

    def __call__(
        self, policy: kvpref.ResponseLogps, reference: kvpref.ResponseLogps | None, batch: kvpref.Batch
    ) -> kvpref.LossOutput:
        CountingLoss.phase = "step"
        weights = batch.tensors(weights_of, self.missing)
        CountingLoss.phase = "collation"
        sums = policy.sum()
        return kvpref.LossOutput((weights * (sums[1::2] - sums[0::2])).mean(), {})

    def prepare_batch(self, batch: kvpref.Batch) -> None:
        batch.tensors(weights_of, self.missing)


@pytest.fixture(autouse=True)
def no_builds_yet() -> None:
    BUILDS.clear()
    CountingLoss.phase = "collation"


def make_trainer(folder: Path, loss: PreferenceLoss, **settings: Any) -> kvpref.PreferenceTrainer:
    args = make_args(str(folder), **settings)
    groups = make_groups(12)
    return kvpref.PreferenceTrainer(model=make_model(), args=args, train_dataset=groups, eval_dataset=groups, loss=loss)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases are told apart in one thread."""
    monkeypatch.setattr(loading, "collates_ahead", lambda _: False)


@pytest.mark.parametrize("settings", [{}, {"schedule": "bounded"}], ids=["full", "bounded"])
def test_in_collation_and_never_in_the_step(tmp_path: Path, no_threads: None, settings: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, CountingLoss(), **settings)
    trainer.train()
    num_trained = len(BUILDS)
    assert num_trained >= 4  # two steps of several micro-batches
    trainer.evaluate()
    assert len(BUILDS) > num_trained
    assert {phase for _, phase in BUILDS} == {"collation"}


def test_in_the_thread_that_collates_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    original = CountingLoss.prepare_batch
    monkeypatch.setattr(
        CountingLoss,
        "prepare_batch",
        lambda self, batch: names.append(threading.current_thread().name) or original(self, batch),
    )
    make_trainer(tmp_path, CountingLoss()).train()
    assert any(name.startswith("kvpref-prefetch") for name in names)
    assert len(names) == len(BUILDS)


def test_in_data_workers(tmp_path: Path) -> None:
    """They are other processes: here nothing at all is built."""
    trainer = make_trainer(tmp_path, CountingLoss(), dataloader_num_workers=1)
    trainer.train()
    assert trainer.state.global_step == 2
    assert not BUILDS


def test_what_workers_cannot_be_sent_is_made_in_the_step(tmp_path: Path) -> None:
    class Local(CountingLoss):
        """Inside a function, where pickle does not find it."""

    make_trainer(tmp_path, Local(), dataloader_num_workers=1).train()
    assert {phase for _, phase in BUILDS} == {"step"}


def test_workers_that_are_no_forks_get_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for method, gets_it in (("fork", True), ("spawn", False)):
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda method=method: method)
        trainer = make_trainer(tmp_path, CountingLoss(), dataloader_num_workers=1)
        assert (trainer.get_train_dataloader().dataset.loss is trainer.loss) == gets_it


@pytest.mark.parametrize("settings", [{}, {"dataloader_num_workers": 1}], ids=["thread", "worker"])
def test_what_is_missing_is_told_in_the_same_words(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, CountingLoss(missing="made:7"), **settings)
    with pytest.raises(kvpref.InputError) as found:
        trainer.train()
    assert str(found.value) == MISSING


def test_a_users_columns_are_made_ahead_too(tmp_path: Path, no_threads: None) -> None:
    made = []

    @kvpref.loss(columns=["weight", "note"])
    def weighted(policy: kvpref.ResponseLogps, reference: None, batch: kvpref.Batch) -> torch.Tensor:
        made.append([asked[1:] for asked, _ in batch._made])
        return -(policy.sum() * batch.sequence_column("weight")).mean()

    groups = [
        kvpref.Group(group.sequences, group.scores, group.labels, group.id, {"weight": [1.0, 0.5], "note": "text"})
        for group in make_groups(6)
    ]
    args = make_args(str(tmp_path), max_steps=1)
    kvpref.PreferenceTrainer(model=make_model(), args=args, train_dataset=groups, loss=weighted).train()
    assert made
    assert all(asked == [("weight",)] for asked in made)
