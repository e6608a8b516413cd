"""A whole training step of `PreferenceTrainer` under a watch on the host: dpo, kto, grpo and bradley_terry."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import make_args
from tiny_models import VOCAB_SIZE, tiny_model, tiny_reward_model

import kvpref
from kvpref.training import finite
from kvpref.training.loading.inputs import StepInputs

LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "kto": {},
    "grpo": {"beta": 0.04, "advantages": "advantage"},
    "bradley_terry": {"margin_column": "margin"},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "full": {},
    "bounded": {"schedule": "bounded", "max_tokens_per_chunk": 60},
}
Watch = Callable[[], AbstractContextManager[None]]


def make_groups(num_groups: int) -> list[kvpref.Group]:
    """Pairs with shared prompts, and columns for those losses that read some."""
    generator = random.Random(0)

    def draw(low: int, high: int) -> list[int]:
        return [generator.randrange(3, VOCAB_SIZE) for _ in range(generator.randint(low, high))]

    groups = []
    for index in range(num_groups):
        prompt = draw(16, 30)
        responses = [kvpref.Sequence.from_prompt_and_response(prompt, draw(2, 12)) for _ in range(2)]
        columns = {"margin": 0.1 * index, "advantage": [0.5, -0.5]}
        groups.append(kvpref.Group(responses, labels=[True, False], id=f"made:{index + 1}", columns=columns))
    return groups


def make_trainer(loss: str, folder: Path, dtype: torch.dtype, **settings: Any) -> kvpref.PreferenceTrainer:
    args = make_args(
        str(folder),
        loss=loss,
        loss_args=LOSSES[loss],
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **settings,
    )
    is_reward = loss == "bradley_terry"
    model = (tiny_reward_model if is_reward else tiny_model)("mistral", dtype)  # head dim 16: kernels need it
    trainer = kvpref.PreferenceTrainer(model=model.to(args.device), args=args, train_dataset=make_groups(8))
    trainer.references.prepare("train", trainer.train_dataset)
    return trainer


def optimizer_step(trainer: kvpref.PreferenceTrainer, steps: list[StepInputs]) -> torch.Tensor:
    """What transformers' loop does with an accumulated step, up to the change of the weights."""
    num_units = sum(trainer.loss.num_units(item.batch) for step in steps for item in step)
    total = torch.zeros((), device=trainer.args.device)
    for index, inputs in enumerate(steps):
        trainer.accelerator.gradient_state._set_sync_gradients(index == len(steps) - 1)
        total += trainer.training_step(trainer.model, inputs, num_units)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
    return total


def check_a_whole_step(
    trainer: kvpref.PreferenceTrainer, watch: Watch, unwatched: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `watch` an optimizer step reads the device once: the losses, in `finite.read_losses`.

    Args:
        trainer: Not yet trained.
        watch: What is raised inside makes the host wait.
        unwatched: Lifts the watch again, inside it.
        monkeypatch: Of the test.
    """
    loader = trainer.get_train_dataloader()
    optimizer_step(trainer, list(loader))  # kernels load, and Triton compiles, on first use
    trainer.model.zero_grad()
    reads = []
    original = finite.read_losses

    def read_losses(losses: list[torch.Tensor]) -> list[float]:
        with unwatched():
            reads.append(original(losses))
        return reads[-1]

    monkeypatch.setattr(finite, "read_losses", read_losses)
    steps = list(loader)
    num_micro_batches = sum(len(step.micro_batches) for step in steps)
    assert num_micro_batches > len(steps) == 2
    with watch():
        total = optimizer_step(trainer, steps)
    assert [len(losses) for losses in reads] == [num_micro_batches]
    assert total.isfinite()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in trainer.model.parameters())
