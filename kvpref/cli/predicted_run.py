"""What is predicted of a run's time and memory before its first step."""

from __future__ import annotations

import torch

from kvpref.cli.run_config import RunConfig
from kvpref.cli.time_left import in_words
from kvpref.cli.token_budget import predict_peak
from kvpref.profiling.matrix_rate import measure_matrix_rate
from kvpref.training import PreferenceTrainer
from kvpref.training.defaults import token_budget, trains_an_adapter

ADAPTER_SHARE = 2 / 3
"""Of the FLOPs of forward and backward: the gradients of frozen weights are left out."""

WORTH_PREDICTING = 300.0
"""Seconds of a run for which some seconds of predicting its peak do not matter."""


class PredictedRun:
    """Time and memory of a run.

    Args:
        trainer: As it is about to train.
        run: Its settings.
        flops: Of all forward and backward passes of this device, of a whole model.
    """

    def __init__(self, trainer: PreferenceTrainer, run: RunConfig, flops: float) -> None:
        self._trainer, self._run = trainer, run
        self.flops = flops * (ADAPTER_SHARE if trains_an_adapter(trainer.model) else 1)
        self.rate = measure_matrix_rate(trainer.args.device, self._dtype())

    @property
    def least_seconds(self) -> float:
        """What the FLOPs take at the rate of matrix products."""
        return self.flops / self.rate

    def work(self) -> str:
        """FLOPs, and the least time that they take."""
        return (
            f"{self.flops:.2g} FLOPs per device, forward and backward: at least {in_words(self.least_seconds)} at the "
            f"{self.rate / 1e9:.3g} GFLOP/s of matrix products measured here"
        )

    def peak(self) -> str | None:
        """The predicted peak; None where predicting would hold up a short run."""
        if self.least_seconds < WORTH_PREDICTING:
            return None
        trainer = self._trainer
        assert trainer.train_dataset is not None
        budget = token_budget(trainer.args, trainer.train_dataset)
        return predict_peak(trainer.model, self._run, trainer.args, trainer.loss, trainer.train_dataset, budget)

    def _dtype(self) -> torch.dtype:
        args = self._trainer.args
        if args.bf16 or args.fp16:
            return torch.bfloat16 if args.bf16 else torch.float16
        return next(self._trainer.model.parameters()).dtype
