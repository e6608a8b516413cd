"""The Hugging Face Hub: whether a run can push to it, the card beside each model, and what is uploaded."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from kvpref.errors import InputError, RunError
from kvpref.training.model_card import CARD_FILE, write_card
from kvpref.training.saving import STATE_FILE, SavingTrainer, saving

NOT_UPLOADED = (
    "_*",
    "checkpoint-*",
    "partial-*",
    "reference_logps/*",
    "*bad_rows.jsonl",
    "resume.json",
    "result.json",
    "run.yaml",
    "training_args.bin",
)
"""Files of an output folder that only the run needs: log-probs, rows of the data, paths on this machine, tokens."""

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
_STATE_FILES = (STATE_FILE, "reference.safetensors")
"""Files of a checkpoint with such names that are not the model's."""


def check_hub(token: str | None, where: str = "push_to_hub") -> str:
    """The account that a run will push with, checked with the hub before hours are spent.

    Args:
        token: A token with write permission; None for the one from ``hf auth login`` or ``HF_TOKEN``.
        where: The setting that asked for the push, for the message.

    Raises:
        InputError: If there is no token, the hub refuses it or cannot be reached.
    """
    try:
        return str(huggingface_hub.whoami(token=token)["name"])
    except Exception as error:  # errors of the hub, the network or a file: they have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{where}: the hub does not take this login: {reason}; log in with `hf auth login` or set HF_TOKEN to a "
            "token with write permission, or leave the push out"
        ) from error


class HubTrainer(SavingTrainer):
    """`transformers.Trainer` that writes a model card, and whose pushes leave out what only the run needs."""

    hub_model_id: str | None  # type: ignore[assignment]
    push_in_progress: Any
    _said_that_card_stays = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `transformers.Trainer`, with a card beside the model; with `push_to_hub` it is also uploaded.

        Raises:
            RunError: If it cannot be written or uploaded.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        self.save_with_card(output_dir)
        if self.args.push_to_hub:
            self.upload("Model save")

    def save_with_card(self, output_dir: str | None = None) -> None:
        """Save the model and its card without uploading."""
        super().save_model(output_dir)
        self._write_card(output_dir)

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, **metadata: Any
    ) -> None:
        """Write ``README.md`` in the output folder, on the main process, unless someone else wrote it.

        Args:
            model_name: Its title; default: the name of the folder.
            **metadata: Entries of its header, such as ``license``, ``language`` or ``tags``.
        """
        self._write_card(None, model_name, **metadata)

    def _write_card(self, output_dir: str | None, title: str | None = None, **metadata: Any) -> None:
        from kvpref.training.card_facts import card_facts  # which reads trainers

        if not self.is_world_process_zero():
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        if title is None and self.args.hub_model_id is not None:
            title = self.args.hub_model_id.rpartition("/")[2]
        try:
            facts = card_facts(self, title, **metadata)  # type: ignore[arg-type]
        except Exception as error:  # errors from a user's loss or model: no reason to lose what was trained
            warnings.warn(f"{folder}: no model card is written: {error!r}", stacklevel=2)
            return
        is_written = write_card(folder, facts)
        if not is_written and not self._said_that_card_stays:
            self._said_that_card_stays = True
            print(f"{folder / CARD_FILE} is not as kvpref wrote it, and is left as it is", file=sys.stderr)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **metadata: Any,
    ) -> Any:
        """As in `transformers.Trainer`: save the model with its card, and upload the output folder.

        Args:
            commit_message: Message of the commit.
            blocking: Whether to wait for the end of the upload.
            token: Overrides `hub_token` of the arguments.
            revision: A branch; overrides `hub_revision`.
            private: Whether a newly created repository is private.
            **metadata: As for `create_model_card`.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        super().save_model()
        self._write_card(None, **{"title": metadata.pop("model_name", None), **metadata})
        return self.upload(commit_message, blocking=blocking, token=token, revision=revision)

    def upload(
        self,
        commit_message: str | None = "End of training",
        *,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ) -> Any:
        """Upload the output folder unchanged, from the main process; see `push_to_hub`.

        Raises:
            RunError: If it cannot be uploaded. The model is still saved in the output folder.
        """
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        try:
            return self._upload_folder(
                str(self.args.output_dir),
                commit_message,
                token=token,
                revision=revision,
                ignore_patterns=list(NOT_UPLOADED),
                run_as_future=not blocking,
            )
        except Exception as error:  # errors of the network have no common base
            raise RunError(
                f"cannot push to {self.hub_model_id}: {' '.join(str(error).split())}; the model is saved in "
                f"{self.args.output_dir}; kvpref train --resume (or push_to_hub) tries again"
            ) from error

    def _upload_folder(self, folder: str, message: str | None, **settings: Any) -> Any:
        args = self.args
        assert self.hub_model_id is not None
        settings["token"] = settings.get("token") or args.hub_token
        settings["revision"] = settings.get("revision") or args.hub_revision
        return huggingface_hub.upload_folder(
            repo_id=self.hub_model_id, folder_path=folder, commit_message=message, **settings
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `transformers.Trainer`, for values of `hub_strategy` other than ``end``; continues in a thread."""
        strategy, output = self.args.hub_strategy, str(self.args.output_dir)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        under_way = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if under_way and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        with saving(output, self.state.global_step):
            for pattern in _MODEL_FILES:
                for path in Path(checkpoint_folder).glob(pattern):
                    if path.name not in _STATE_FILES:
                        shutil.copy(path, output)
        ignored = list(NOT_UPLOADED)
        jobs: Any = [self._upload_folder(output, message, ignore_patterns=ignored, run_as_future=True)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            jobs.append(
                self._upload_folder(
                    checkpoint_folder,
                    f"{message}, checkpoint",
                    path_in_repo=name,
                    run_as_future=True,
                    ignore_patterns=["training_args.bin"],
                )
            )
        if under_way:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)
