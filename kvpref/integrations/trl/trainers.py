"""TRL's trainers, with log-probs and rewards from kvpref's engine."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer, reward_trainer

from kvpref.errors import InputError
from kvpref.integrations.trl.forwards import (
    add_shared_prompt_head,
    add_shared_prompt_rewards,
    asking_for_rewards,
    replaced_heads,
)
from kvpref.integrations.trl.refusals import refuse_unsupported
from kvpref.integrations.trl.replacements import without_replaced
from kvpref.integrations.trl.setup import Setup
from kvpref.integrations.trl.sharded_passes import (
    keep_weights_in_forward,
    loss_of_passes,
    past_engine,
    weights_kept,
)
from kvpref.models.support import unwrap
from kvpref.parallel.deepspeed_limits import prepare_deepspeed
from kvpref.parallel.sharding import is_zero_3
from kvpref.plan.modes import MODES
from kvpref.training.arguments import check_processes


class SharedPromptTrainer:
    """Base of the trainers below: refusals first, then TRL's own construction.

    Attributes:
        kvpref_mode: How batches run; see `kvpref.response_logps`.
    """

    _trl_class: ClassVar[type]
    _add_head: ClassVar[Callable[..., None]] = staticmethod(add_shared_prompt_head)
    args: Any
    accelerator: Any

    def __init__(self, *args: Any, mode: str = "two_pass", **kwargs: Any) -> None:
        if mode not in MODES:
            raise InputError(f"unknown mode {mode!r}; choose from: {', '.join(MODES)}")
        given = inspect.signature(self._trl_class).bind(*args, **kwargs)
        setup = Setup.from_arguments(self._trl_class.__name__, given.arguments)
        refuse_unsupported(setup)
        given.arguments["args"] = without_replaced(setup)
        self.kvpref_mode = mode
        self._passes = ExitStack()
        cuts_weights = is_zero_3(setup.option("deepspeed_plugin"))
        if cuts_weights:
            prepare_deepspeed(setup.option("deepspeed_plugin"))
        with self._construction():
            super().__init__(*given.args, **given.kwargs)
        check_processes(self.args)
        keep_weights_in_forward(getattr(self, "ref_model", None))
        if cuts_weights and self.args.gradient_checkpointing_kwargs:
            # TRL sets it for PEFT, whose layers would be gathered again; here they stay.
            self.args.gradient_checkpointing_kwargs["use_reentrant"] = False

    def _construction(self) -> AbstractContextManager[None]:
        """Entered while TRL builds the trainer, so that its policy and reference get kvpref's forward."""
        return replaced_heads(sys.modules[self._trl_class.__module__], self.kvpref_mode, self._add_head)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """TRL's step; on DeepSpeed ZeRO-3, its backward passes bypass the engine."""
        with past_engine(model, self.accelerator) as self._passes:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
            return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> Any:
        """TRL's loss, on kvpref's log-probs and rewards."""
        trl_loss = super().compute_loss  # type: ignore[misc]
        inputs = self._model_inputs(inputs)

        def compute(called: nn.Module) -> Any:
            return trl_loss(called, inputs, return_outputs, num_items_in_batch)

        return loss_of_passes(model, self.kvpref_mode, compute, self._passes)

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch in the form that kvpref's forward of the model reads."""
        return inputs


class _ReferenceTrainer(SharedPromptTrainer):
    """Base of trainers that also compute a reference's log-probs outside the loss."""

    def compute_ref_log_probs(self, model: nn.Module, inputs: Any) -> Any:
        with weights_kept(model):
            return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]


class DPOTrainer(_ReferenceTrainer, dpo_trainer.DPOTrainer):
    """`trl.DPOTrainer`, with policy and reference log-probs from kvpref: prompts shared by rows are encoded once.

    Args:
        *args: As in TRL.
        mode: As in `kvpref.response_logps`.
        **kwargs: As in TRL.

    Raises:
        InputError: For options that cannot work, if possible before the model is loaded; see `REFUSALS`.
        UnsupportedModelError: If the model would not be computed exactly.
    """

    _trl_class = dpo_trainer.DPOTrainer


class KTOTrainer(_ReferenceTrainer, kto_trainer.KTOTrainer):
    """`trl.KTOTrainer`, with the log-probs of completions and of the KL batch from kvpref.

    Args and errors as in `DPOTrainer`.
    """

    _trl_class = kto_trainer.KTOTrainer


class GRPOTrainer(SharedPromptTrainer, grpo_trainer.GRPOTrainer):
    """`trl.GRPOTrainer`, with current, old and reference log-probs from kvpref; generation stays TRL's.

    Args and errors as in `DPOTrainer`.
    """

    _trl_class = grpo_trainer.GRPOTrainer

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        # TRL itself gathers ZeRO-3's weights.
        gathers = self.is_fsdp_enabled and not self.use_vllm and self.args.ds3_gather_for_generation
        with weights_kept(self.model_wrapped) if gathers else nullcontext():
            return super()._generate(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with weights_kept(model):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)


class RewardTrainer(SharedPromptTrainer, reward_trainer.RewardTrainer):
    """`trl.RewardTrainer`, with rewards from kvpref.

    Args and errors as in `DPOTrainer`.
    """

    _trl_class = reward_trainer.RewardTrainer

    @contextmanager
    def _construction(self) -> Iterator[None]:
        yield
        model: Any = self.model
        add_shared_prompt_rewards(unwrap(model), mode=self.kvpref_mode)

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return asking_for_rewards(inputs)
