"""A `transformers.Trainer` as an iterator over its optimizer steps, so that two of them can take turns."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

from transformers import Trainer, TrainerCallback


class _Pauses(TrainerCallback):
    """Passes on each step's loss and pauses the trainer until the next is requested; times the optimizer."""

    def __init__(self) -> None:
        self.losses: list[Any] = []
        self.optimizer_seconds: list[float] = []
        self.finished: queue.Queue[float | BaseException | None] = queue.Queue()
        self.may_go_on = threading.Semaphore(0)
        self._optimizer_started = 0.0

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._optimizer_started = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.optimizer_seconds.append(time.perf_counter() - self._optimizer_started)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        # Reading the loss waits for the device, so the step is over when it is handed over.
        self.finished.put(float(self.losses.pop()))
        self.may_go_on.acquire()


def trainer_steps(trainer: Trainer, optimizer_seconds: list[float]) -> Iterator[float]:
    """Run ``trainer.train()`` step by step: each `next` is what the trainer does for one optimizer step, with its data
    loading, and gives its loss. The first one sets up training too.

    The trainer runs in a thread of its own, which waits between the steps: nothing runs at the same time.

    Args:
        trainer: With one micro-batch per optimizer step.
        optimizer_seconds: Gets the optimizer's share of each step.

    Raises:
        Whatever the trainer raises.
    """
    pauses = _Pauses()
    pauses.optimizer_seconds = optimizer_seconds
    trainer.add_callback(pauses)
    inner = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = inner(*args, **kwargs)
        pauses.losses.append(loss.detach())
        return loss

    trainer.training_step = training_step  # type: ignore[method-assign]

    def train() -> None:
        try:
            trainer.train()
        except BaseException as error:  # raised again where the steps are asked for
            pauses.finished.put(error)
        else:
            pauses.finished.put(None)

    # A daemon: a reader that stops early must not keep the process alive.
    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    while (item := pauses.finished.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item
        pauses.may_go_on.release()
    thread.join()
