"""Saves are complete or not at all: checkpoints count only once complete, and failed writes get clear errors."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel

from kvpref.errors import RunError
from kvpref.models.saved_weights import load_saved_weights, renames_weights
from kvpref.models.support import unwrap
from kvpref.training.adapters import is_peft
from kvpref.training.deepspeed_checkpoints import make_readable
from kvpref.training.generation_config import savable_generation_config
from kvpref.training.model_card import CARD_FILE
from kvpref.training.sharding import ShardingTrainer

STATE_FILE = "trainer_state.json"
"""Written last: a checkpoint without it is incomplete."""

_PARTIAL_FOLDER = "partial-model"


@contextlib.contextmanager
def saving(output_dir: str | None, step: int) -> Iterator[None]:
    """Raise RunError if anything inside cannot be written.

    Args:
        output_dir: The output folder, for the message.
        step: The optimizer step, for the message.
    """
    try:
        yield
    except RunError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, CheckpointException) as error:
        what, go_on = what_is_left(output_dir)
        # A full disk raises any of the first three, depending on which file was being written.
        raise RunError(
            f"cannot save to {output_dir} at step {step}: {' '.join(str(error).split())}; {what}. Make room (or fix "
            f"permissions), then {go_on}"
        ) from error


def what_is_left(output_dir: str | None) -> tuple[str, str]:
    """What is left to continue from after a failure, and how; for messages."""
    if any(is_complete(path) for path in Path(output_dir or ".").glob("checkpoint-*")):
        return "earlier checkpoints are intact", "continue with --resume"
    return "there is no earlier checkpoint", "start again"


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written completely."""
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return True


class SavingTrainer(ShardingTrainer):
    """`transformers.Trainer` whose saves leave earlier files intact if they fail or are killed."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `transformers.Trainer`, but an existing model is replaced only once the new one is written.

        Raises:
            RunError: If it cannot be written.
        """
        assert self.model is not None
        with saving(self.args.output_dir, self.state.global_step), savable_generation_config(unwrap(self.model)):
            if _internal_call:
                super().save_model(output_dir, _internal_call)
                return
            folder = Path(output_dir or self.args.output_dir or ".")
            partial = folder / _PARTIAL_FOLDER
            try:
                if self.args.should_save:
                    shutil.rmtree(partial, ignore_errors=True)
                self._wait_for_ranks()
                self._save_plain(str(partial))
                self._wait_for_ranks()
                if self.args.should_save:
                    _move(partial, folder)
            finally:
                if self.args.should_save:
                    shutil.rmtree(partial, ignore_errors=True)

    def _save_plain(self, folder: str) -> None:
        """Save the model as files that transformers (or PEFT) loads, however it is spread over ranks."""
        if self.is_fsdp_enabled and self._is_sharded():
            self._save(folder, state_dict=self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(folder, _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None and self.is_fsdp_enabled:
            assert self.model is not None
            tie_again(self.model, state_dict)
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        try:
            with saving(self.args.output_dir, self.state.global_step):
                if self.args.should_save:
                    _remove_incomplete(folder)
                    self.references.save(folder)
                super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save and not is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)  # useless, and it may be what fills the disk
            raise

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.is_deepspeed_enabled and isinstance(resume_from_checkpoint, str | os.PathLike):
            make_readable(self, Path(resume_from_checkpoint))
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        renamed = self._model_with_renamed_weights()
        if renamed is not None:
            load_saved_weights(renamed, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        renamed = self._model_with_renamed_weights()
        if renamed is not None:
            load_saved_weights(renamed, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _model_with_renamed_weights(self) -> PreTrainedModel | None:
        """The model, if transformers' trainer would not find its weights in files that it wrote itself; else None."""
        assert self.model is not None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or is_peft(self.model):
            return None
        inner = unwrap(self.model)
        return inner if renames_weights(inner) else None

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._wait_for_ranks()  # the trainer state, which marks the checkpoint as complete, comes next

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the last step's checkpoint, in the middle of an epoch: transformers would run one more step.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _wait_for_ranks(self) -> None:
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()


def tie_again(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Let weights tied in the model be one tensor among the gathered ones, so that they are saved once."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kept = first.setdefault(id(parameter), name)
        if kept != name and name in weights and kept in weights:
            weights[name] = weights[kept]


def _remove_incomplete(folder: Path) -> None:
    """Remove an incomplete checkpoint at `folder`, which must not be taken for a complete one while it is rewritten.

    Other incomplete checkpoints go too, or transformers would count them when it deletes the oldest ones.
    """
    (folder / STATE_FILE).unlink(missing_ok=True)
    for other in folder.parent.glob("checkpoint-*"):
        is_numbered = other.name.removeprefix("checkpoint-").isdigit()  # or it is the user's
        if is_numbered and other.is_dir() and other != folder and not is_complete(other):
            shutil.rmtree(other, ignore_errors=True)


def _move(partial: Path, folder: Path) -> None:
    """Replace every file of the previous model by the newly written one."""
    (partial / CARD_FILE).unlink(missing_ok=True)  # PEFT's draft, which knows nothing of the run
    names = {path.name for path in partial.iterdir()}
    for path in sorted(partial.iterdir()):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    for pattern in ("model-*-of-*.safetensors", "model.safetensors*"):
        for stale in folder.glob(pattern):
            if stale.name not in names:
                stale.unlink()
