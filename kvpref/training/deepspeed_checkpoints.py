"""DeepSpeed's checkpoints hold one piece of optimizer state per rank; other numbers of ranks need another form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from transformers import Trainer

from kvpref.errors import InputError, RunError

_CONVERTER = "deepspeed.checkpoint.ds_to_universal"


def make_readable(trainer: Trainer, checkpoint: Path) -> None:
    """Make a checkpoint readable by a different number of ranks, as a DeepSpeed universal checkpoint beside it.

    Called on all ranks, before the engine is made; it sets the engine's configuration accordingly.

    Raises:
        InputError: If it was written by ZeRO-3.
        RunError: If it cannot be converted.
    """
    latest = checkpoint / "latest"
    if not latest.exists():
        return  # transformers reports that it is not DeepSpeed's
    tag = latest.read_text().strip()
    num_writers = len(list((checkpoint / tag).glob("*_optim_states.pt")))
    if num_writers in (0, trainer.args.world_size):
        return
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    written = f"{checkpoint}: was written by {num_writers} ranks, and this run has {trainer.args.world_size}"
    if config["zero_optimization"]["stage"] == 3:
        # With DeepSpeed 0.19.8 the first step after a universal checkpoint of ZeRO-3 is off by a few percent.
        raise InputError(
            f"{written}, which ZeRO-3 cannot take over without loss; resume with {num_writers}, or start a new "
            "run from the model in that folder"
        )
    universal = checkpoint / f"{tag}_universal"
    reason = ""
    if trainer.args.process_index == 0 and not universal.exists():
        reason = _convert(checkpoint / tag, universal)
    trainer.accelerator.wait_for_everyone()
    if not universal.exists():
        raise RunError(f"{written}, for which {_CONVERTER} failed{reason}; resume with {num_writers}")
    config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}


def _convert(pieces: Path, universal: Path) -> str:
    """Convert; returns what went wrong, if anything."""
    # It gets its name only once it is complete.
    partial = universal.with_name(f"{universal.name}.partial")
    folders = ("--input_folder", str(pieces), "--output_folder", str(partial))
    command = [sys.executable, "-m", _CONVERTER, *folders, "--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return f" ({lines[-1] if lines else f'exit code {done.returncode}'})"
    partial.rename(universal)
    (universal.parent / "latest_universal").write_text(universal.name)
    return ""
