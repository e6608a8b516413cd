"""Losses of several batched steps are read at once, and the first that is not finite is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from preference_runs import make_args, make_groups, make_model

import kvpref
from kvpref.training import finite
from kvpref.training.finite import LossCheck
from kvpref.training.loading.inputs import MicroBatchInputs, StepInputs
from kvpref.training.step_runner import StepResult


def rank_step(
    groups: list[kvpref.Group], losses: list[float], sums: list[list[float]]
) -> tuple[StepResult, StepInputs]:
    """A micro-batch per group."""
    result = StepResult(
        outputs=[kvpref.LossOutput(torch.tensor(loss), {}) for loss in losses],
        sequence_values=[torch.tensor(own) for own in sums],
    )
    items = [
        MicroBatchInputs(batch=kvpref.collate([group]), group_indices=(index,), is_filler=False)
        for index, group in enumerate(groups)
    ]
    return result, StepInputs(micro_batches=tuple(items))


def test_the_first_of_all_kept_is_named_and_then_forgotten() -> None:
    nan, groups, check = float("nan"), make_groups(4), LossCheck()
    check.add(*rank_step(groups[:1], [1.0], [[0.0, nan]]))  # a finite loss is fine
    check.add(*rank_step(groups[1:3], [0.5, nan], [[0.0, 0.0], [0.0, nan]]))
    check.add(*rank_step(groups[3:], [float("inf")], [[0.0, 0.0]]))
    found = check.find_not_finite()
    assert found is not None
    assert found[0] != found[0]
    assert found[1] == "the log-probs of made:3 are not finite"
    check.add(*rank_step(groups[3:], [float("inf")], [[0.0, 0.0]]))
    assert check.find_not_finite() == (
        float("inf"),
        "all log-probs are finite in this micro-batch, which starts with made:4",
    )
    check.add(*rank_step(groups[:1], [1.0], [[0.0, 0.0]]))
    assert check.find_not_finite() is None


def test_an_accumulated_step_is_read_once_before_the_weights_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    original = finite.read_losses
    monkeypatch.setattr(finite, "read_losses", lambda losses: reads.append(len(losses)) or original(losses))
    args = make_args(
        str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_tokens_per_micro_batch=None
    )
    kvpref.PreferenceTrainer(model=make_model(), args=args, train_dataset=make_groups(12)).train()
    assert reads == [2, 2]


def test_a_loss_that_is_not_finite_in_the_first_part_stops_the_step(tmp_path: Path) -> None:
    def bad(policy: kvpref.ResponseLogps, reference: None, batch: kvpref.Batch) -> torch.Tensor:
        is_bad = any(group.id == "made:2" for group in batch.groups)
        return policy.sum().mean() * (float("inf") if is_bad else 1.0)

    args = make_args(
        str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_tokens_per_micro_batch=None,
        max_steps=1,
    )
    model = make_model()
    trainer = kvpref.PreferenceTrainer(model=model, args=args, train_dataset=make_groups(4), loss=bad)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(kvpref.RunError, match=r"loss is -?inf at optimizer step 1: all log-probs .* made:2;"):
        trainer.train()
    assert all(map(torch.equal, before, model.parameters()))


def test_weights_that_a_gradient_has_spoilt_are_told(tmp_path: Path) -> None:
    """A finite loss may have a gradient that is not: checkpoints since then are not to go on from."""

    def spoils(policy: kvpref.ResponseLogps, reference: None, batch: kvpref.Batch) -> torch.Tensor:
        sums = policy.sum()
        return sums.mean() + (sums - sums.detach()).square().sum().sqrt()

    args = make_args(str(tmp_path), per_device_train_batch_size=2, max_steps=3, save_strategy="steps", save_steps=1)
    trainer = kvpref.PreferenceTrainer(model=make_model(), args=args, train_dataset=make_groups(6), loss=spoils)
    with pytest.raises(kvpref.RunError) as raised:
        trainer.train()
    assert "at optimizer step 2" in str(raised.value)
    assert "weights are not finite since an earlier step, nor are they in checkpoints written" in str(raised.value)
    assert "resume from a checkpoint before that" in str(raised.value)
    assert "intact" not in str(raised.value)
