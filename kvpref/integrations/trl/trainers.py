"""TRL's trainers, with log-probs and rewards from kvpref's engine."""

from __future__ import annotations

import inspect
import sys
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import trl
from torch import nn

from kvpref.errors import InputError
from kvpref.integrations.trl.forwards import add_shared_prompt_rewards, asking_for_rewards, shared_prompt_heads
from kvpref.integrations.trl.refusals import Setup, refuse_unsupported
from kvpref.modeling.support import unwrap
from kvpref.plans import MODES


class _SharedPromptTrainer:
    """What the trainers below have in common: refusals first, then TRL's own construction around kvpref's forward.

    Attributes:
        kvpref_mode: How batches run; see `kvpref.response_logps`.
    """

    _trl_class: ClassVar[type]

    def __init__(self, *args: Any, mode: str = "two_pass", **kwargs: Any) -> None:
        if mode not in MODES:
            raise InputError(f"unknown mode {mode!r}; choose from: {', '.join(MODES)}")
        given = inspect.signature(self._trl_class).bind(*args, **kwargs).arguments
        refuse_unsupported(Setup.from_arguments(self._trl_class.__name__, given))
        self.kvpref_mode = mode
        module = sys.modules[self._trl_class.__module__]
        has_fused_head = hasattr(module, "add_fused_lm_head")
        with shared_prompt_heads(module, mode) if has_fused_head else nullcontext():
            super().__init__(*args, **kwargs)


class DPOTrainer(_SharedPromptTrainer, trl.DPOTrainer):
    """`trl.DPOTrainer`, with policy and reference log-probs from kvpref: prompts shared by rows are encoded once.

    Args:
        *args: As in TRL.
        mode: As in `kvpref.response_logps`.
        **kwargs: As in TRL.

    Raises:
        InputError: For what cannot work, before the model is loaded where its configuration tells; see `REFUSALS`.
        UnsupportedModelError: If the model would not be computed exactly.
    """

    _trl_class = trl.DPOTrainer


class KTOTrainer(_SharedPromptTrainer, trl.KTOTrainer):
    """`trl.KTOTrainer`, with the log-probs of completions and of the KL batch from kvpref.

    Args and errors as in `DPOTrainer`.
    """

    _trl_class = trl.KTOTrainer


class GRPOTrainer(_SharedPromptTrainer, trl.GRPOTrainer):
    """`trl.GRPOTrainer`, with current, old and reference log-probs from kvpref; generation stays TRL's.

    Args and errors as in `DPOTrainer`.
    """

    _trl_class = trl.GRPOTrainer


class RewardTrainer(_SharedPromptTrainer, trl.RewardTrainer):
    """`trl.RewardTrainer`, with rewards from kvpref.

    Args and errors as in `DPOTrainer`.
    """

    _trl_class = trl.RewardTrainer

    def __init__(self, *args: Any, mode: str = "two_pass", **kwargs: Any) -> None:
        super().__init__(*args, mode=mode, **kwargs)
        add_shared_prompt_rewards(unwrap(self.model), mode=mode)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> Any:
        """TRL's loss on kvpref's rewards."""
        return super().compute_loss(model, asking_for_rewards(inputs), return_outputs, num_items_in_batch)
