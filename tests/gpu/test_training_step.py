"""A whole step of `PreferenceTrainer` on a GPU waits for the device once: to read its losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import whole_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("schedule", whole_step.SCHEDULES)
@pytest.mark.parametrize("loss", whole_step.LOSSES)
def test_a_whole_step_waits_for_the_device_once(
    loss: str, schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"use_cpu": False, **whole_step.SCHEDULES[schedule]}
    trainer = whole_step.make_trainer(loss, tmp_path, torch.bfloat16, **settings)
    assert trainer.args.device.type == "cuda"
    whole_step.check_a_whole_step(
        trainer, lambda: sync_debug_mode("error"), lambda: sync_debug_mode("default"), monkeypatch
    )


def test_batches_wait_in_page_locked_memory(tmp_path: Path) -> None:
    """Those of the loss too: what was made ahead is copied without waiting."""
    trainer = whole_step.make_trainer("dpo", tmp_path, torch.bfloat16, use_cpu=False)
    for step in trainer.get_train_dataloader():
        for item in step:
            made = [tensor for _, tensors in item.batch._made for tensor in tensors]
            assert len(made) == 2
            assert all(tensor.is_pinned() for tensor in made)
