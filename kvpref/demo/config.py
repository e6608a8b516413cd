"""Settings of the demonstration."""

from __future__ import annotations

from dataclasses import dataclass

from kvpref.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes and settings of the demonstration."""

    seed: int = 0
    """Seed of the data, the weights and the order of training."""

    groups_per_step: int = 32
    """Pairs per optimizer step, also in the comparison of modes."""

    num_sft_steps: int = 330
    """Optimizer steps of `sft`, the stage that teaches the task."""

    num_dpo_steps: int = 50

    num_eval_pairs: int = 256
    """Held-out questions."""

    sft_learning_rate: float = 3e-3

    dpo_learning_rate: float = 2e-4
    """Peak learning rate of `dpo`: low, since pairs say which of two answers is better, not how to answer."""

    beta: float = 0.5

    num_compared_steps: int = 4
    """Steps that each mode runs in one round of the comparison."""

    num_rounds: int = 5
    """Rounds of the comparison; times are medians over them."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "seed" and not value > 0:
                raise InputError(f"{name} must be positive; got {value}")

    @property
    def num_train_pairs(self) -> int:
        """Pairs in the training file: enough for the longer stage to see each one once."""
        return self.groups_per_step * max(self.num_sft_steps, self.num_dpo_steps, self.num_compared_steps)

    @classmethod
    def quick(cls, seed: int = 0) -> DemoConfig:
        """A demonstration of a few seconds: every part runs, and the model learns next to nothing."""
        return cls(
            seed=seed,
            groups_per_step=8,
            num_sft_steps=4,
            num_dpo_steps=3,
            num_eval_pairs=16,
            num_compared_steps=1,
            num_rounds=1,
        )
