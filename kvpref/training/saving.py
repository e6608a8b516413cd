"""What is saved is whole: checkpoints that count only once they are complete, and what a failed write becomes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from kvpref.errors import RunError
from kvpref.models.saved_weights import load_saved_weights, renames_weights
from kvpref.models.support import unwrap
from kvpref.training.adapters import is_peft
from kvpref.training.constructors import ConstructedTrainer
from kvpref.training.generation_config import savable_generation_config

if TYPE_CHECKING:
    from kvpref.training.references import References

STATE_FILE = "trainer_state.json"
"""Written last: a checkpoint without it is incomplete."""

_PARTIAL_FOLDER = "partial-model"


@contextlib.contextmanager
def saving(output_dir: str | None, step: int) -> Iterator[None]:
    """Raise RunError if what is written inside cannot be.

    Args:
        output_dir: Where to, for the message.
        step: The optimizer step, for the message.
    """
    try:
        yield
    except RunError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        what, go_on = what_is_left(output_dir)
        # A full disk shows as any of the first three, depending on which file was being written.
        raise RunError(
            f"cannot save to {output_dir} at step {step}: {' '.join(str(error).split())}; {what}. Make room (or fix "
            f"permissions), then {go_on}"
        ) from error


def what_is_left(output_dir: str | None) -> tuple[str, str]:
    """What there is to go on from after a failure, and how; for messages."""
    if any(is_complete(path) for path in Path(output_dir or ".").glob("checkpoint-*")):
        return "earlier checkpoints are intact", "continue with --resume"
    return "there is no earlier checkpoint", "start again"


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return True


class SavingTrainer(ConstructedTrainer):
    """`transformers.Trainer` whose saves leave what was there intact when they fail or are killed."""

    references: References

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `transformers.Trainer`; a model that was there is replaced only once the new one is written.

        Raises:
            RunError: If it cannot be written.
        """
        assert self.model is not None
        with saving(self.args.output_dir, self.state.global_step), savable_generation_config(unwrap(self.model)):
            if _internal_call or self.args.push_to_hub:
                super().save_model(output_dir, _internal_call)
                return
            folder = Path(output_dir or self.args.output_dir or ".")
            partial = folder / _PARTIAL_FOLDER
            try:
                if self.args.should_save:
                    shutil.rmtree(partial, ignore_errors=True)
                self._wait_for_ranks()
                super().save_model(str(partial), _internal_call=True)
                self._wait_for_ranks()
                if self.args.should_save:
                    _move(partial, folder)
            finally:
                if self.args.should_save:
                    shutil.rmtree(partial, ignore_errors=True)

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
                shutil.rmtree(folder, ignore_errors=True)  # of no use, and it may be what fills the disk
            raise

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
        """The model, where transformers' trainer would not find its weights in the files that it wrote itself."""
        assert self.model is not None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or is_peft(self.model):
            return None
        inner = unwrap(self.model)
        return inner if renames_weights(inner) else None

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._wait_for_ranks()  # the trainer state, which says that all is there, comes next

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the last step's checkpoint, in the middle of an epoch: transformers would make one step more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _wait_for_ranks(self) -> None:
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()


def _remove_incomplete(folder: Path) -> None:
    """Make room for the checkpoint `folder`: until it is whole, it must not be taken for one.

    Others that were never completed go, or transformers would count them when it deletes the oldest ones.
    """
    (folder / STATE_FILE).unlink(missing_ok=True)
    for other in folder.parent.glob("checkpoint-*"):
        if other.is_dir() and other != folder and not is_complete(other):
            shutil.rmtree(other, ignore_errors=True)


def _move(partial: Path, folder: Path) -> None:
    """Put every file of a written model in the place of its predecessor."""
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
