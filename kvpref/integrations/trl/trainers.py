"""TRL's trainers, with log-probs and rewards from kvpref's engine."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer, reward_trainer

from kvpref.errors import InputError
from kvpref.integrations.trl.forwards import add_shared_prompt_rewards, asking_for_rewards, shared_prompt_heads
from kvpref.integrations.trl.refusals import refuse_unsupported
from kvpref.integrations.trl.replacements import without_replaced
from kvpref.integrations.trl.setup import Setup
from kvpref.models.support import unwrap
from kvpref.plan.modes import MODES
from kvpref.training.arguments import check_processes


class _SharedPromptTrainer:
    """What the trainers below have in common: refusals first, then TRL's own construction.

    Attributes:
        kvpref_mode: How batches run; see `kvpref.response_logps`.
    """

    _trl_class: ClassVar[type]
    args: Any

    def __init__(self, *args: Any, mode: str = "two_pass", **kwargs: Any) -> None:
        if mode not in MODES:
            raise InputError(f"unknown mode {mode!r}; choose from: {', '.join(MODES)}")
        given = inspect.signature(self._trl_class).bind(*args, **kwargs)
        setup = Setup.from_arguments(self._trl_class.__name__, given.arguments)
        refuse_unsupported(setup)
        if setup.args is not None:
            given.arguments["args"] = without_replaced(setup)
        self.kvpref_mode = mode
        with self._construction():
            super().__init__(*given.args, **given.kwargs)
        check_processes(self.args)

    def _construction(self) -> AbstractContextManager[None]:
        """Entered while TRL builds the trainer: its policy and reference get kvpref's forward."""
        return shared_prompt_heads(sys.modules[self._trl_class.__module__], self.kvpref_mode)


class DPOTrainer(_SharedPromptTrainer, dpo_trainer.DPOTrainer):
    """`trl.DPOTrainer`, with policy and reference log-probs from kvpref: prompts shared by rows are encoded once.

    Args:
        *args: As in TRL.
        mode: As in `kvpref.response_logps`.
        **kwargs: As in TRL.

    Raises:
        InputError: For what cannot work, before the model is loaded where its configuration tells; see `REFUSALS`.
        UnsupportedModelError: If the model would not be computed exactly.
    """

    _trl_class = dpo_trainer.DPOTrainer


class KTOTrainer(_SharedPromptTrainer, kto_trainer.KTOTrainer):
    """`trl.KTOTrainer`, with the log-probs of completions and of the KL batch from kvpref.

    Args and errors as in `DPOTrainer`.
    """

    _trl_class = kto_trainer.KTOTrainer


class GRPOTrainer(_SharedPromptTrainer, grpo_trainer.GRPOTrainer):
    """`trl.GRPOTrainer`, with current, old and reference log-probs from kvpref; generation stays TRL's.

    Args and errors as in `DPOTrainer`.
    """

    _trl_class = grpo_trainer.GRPOTrainer


class RewardTrainer(_SharedPromptTrainer, reward_trainer.RewardTrainer):
    """`trl.RewardTrainer`, with rewards from kvpref.

    Args and errors as in `DPOTrainer`.
    """

    _trl_class = reward_trainer.RewardTrainer

    @contextmanager
    def _construction(self) -> Iterator[None]:
        yield
        model: Any = self.model
        add_shared_prompt_rewards(unwrap(model), mode=self.kvpref_mode)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> Any:
        """TRL's loss on kvpref's rewards."""
        return super().compute_loss(model, asking_for_rewards(inputs), return_outputs, num_items_in_batch)
