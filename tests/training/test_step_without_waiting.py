"""A training step reads the device once. On the CPU its reads can be seen, not its copies: see tests/gpu."""

from __future__ import annotations

from pathlib import Path

import host_waits
import pytest
import torch
import whole_step

import kvpref
from kvpref.losses import as_loss


@pytest.mark.thinned(2)
@pytest.mark.parametrize("schedule", whole_step.SCHEDULES)
@pytest.mark.parametrize("loss", whole_step.LOSSES)
def test_a_whole_step_reads_the_device_once(
    loss: str, schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = whole_step.make_trainer(loss, tmp_path, torch.float32, **whole_step.SCHEDULES[schedule])
    whole_step.check_a_whole_step(trainer, lambda: host_waits.refused("cpu"), host_waits.allowed, monkeypatch)


def test_the_watch_sees_a_loss_that_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = whole_step.make_trainer("dpo", tmp_path, torch.float32)
    own = trainer.loss

    def reading(policy: kvpref.ResponseLogps, reference: kvpref.ResponseLogps, batch: kvpref.Batch) -> torch.Tensor:
        output = own(policy, reference, batch)
        return output.loss * (1 if output.loss.item() > 0 else 2)

    trainer._step_runner.loss = as_loss(reading)
    with pytest.raises(host_waits.WaitError):
        whole_step.check_a_whole_step(trainer, lambda: host_waits.refused("cpu"), host_waits.allowed, monkeypatch)
