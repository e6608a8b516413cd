"""Predicts a run's time and memory before its first step."""

from __future__ import annotations

import torch

from kvpref.cli.run_config import RunConfig
from kvpref.cli.time_left import in_words
from kvpref.cli.token_budget import predict_peak
from kvpref.profiling.matrix_rate import measure_matrix_rate
from kvpref.training import PreferenceTrainer
from kvpref.training.defaults import token_budget, trains_an_adapter

ADAPTER_SHARE = 2 / 3
"""An adapter's share of the FLOPs of forward and backward: gradients of frozen weights are left out."""

WORTH_PREDICTING = 300.0
"""Length of a run, in seconds, at which a few seconds for predicting its peak do not matter."""


class PredictedRun:
    """Time and memory of a run.

    Args:
        trainer: The trainer, ready to train.
        run: The run's settings.
        flops: FLOPs of all forward and backward passes on this device, for full training.
    """

    def __init__(self, trainer: PreferenceTrainer, run: RunConfig, flops: float) -> None:
        self._trainer, self._run = trainer, run
        self.flops = flops * (ADAPTER_SHARE if trains_an_adapter(trainer.model) else 1)
        self.rate = measure_matrix_rate(trainer.args.device, self._dtype())

    @property
    def least_seconds(self) -> float:
        """The time of the FLOPs at the rate of matrix products."""
        return self.flops / self.rate

    def work(self) -> str:
        """The FLOPs, and the least time they take, as a text."""
        return (
            f"{self.flops:.2g} FLOPs per device, forward and backward: at least {in_words(self.least_seconds)} at the "
            f"{self.rate / 1e9:.3g} GFLOP/s of matrix products measured here"
        )

    def peak(self) -> str | None:
        """The predicted peak; None if predicting would delay a short run."""
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
