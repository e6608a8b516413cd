"""Callbacks: the sampler's epoch, the metrics file, throughput in the progress bar, and reference sync."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kvpref.atomic_files import write_text
from kvpref.data import StepSampler
from kvpref.data.statistics import TOKEN_SAVING
from kvpref.training.meters import TokenMeter
from kvpref.training.saving import saving

METRICS_FILE = "metrics.jsonl"


class EpochCallback(TrainerCallback):
    """Tells the sampler the epoch to plan, also right after a resume, when the loader is wrapped to skip steps."""

    def __init__(self, sampler: StepSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class MetricsFileCallback(TrainerCallback):
    """Appends every log line to ``metrics.jsonl`` in the output directory, on the main process."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        path = _metrics_path(args)
        if not state.is_world_process_zero or not path.exists():
            return
        # Steps after the checkpoint that this run resumes from will be repeated.
        lines = [line for line in path.read_text().splitlines() if _step(line) <= state.global_step]
        write_text(path, "".join(f"{line}\n" for line in lines) if state.global_step else "")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            path = _metrics_path(args)
            with saving(args.output_dir, state.global_step):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class SyncReferenceCallback(TrainerCallback):
    """Calls `sync` after every `num_steps` optimizer steps, before the checkpoint of that step is written."""

    def __init__(self, sync: Callable[[], None], num_steps: int) -> None:
        self.sync, self.num_steps = sync, num_steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.num_steps == 0:
            self.sync()


class ThroughputProgressCallback(ProgressCallback):
    """transformers' progress bar with examples/s, unique tokens/s and the saving."""

    def __init__(self, meter: TokenMeter) -> None:
        super().__init__()
        self.meter = meter

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        bar = getattr(self, "training_bar", None)
        if bar is not None and self.meter.num_groups:
            rates = self.meter.rates(args.world_size)
            bar.set_postfix_str(
                f"{rates['groups_per_second']:.1f} examples/s, "
                f"{rates['unique_tokens_per_second']:.0f} unique tokens/s, {rates['token_saving']:.2f}x token saving",
                refresh=False,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if state.is_world_process_zero and self.meter.num_groups:
            print(f"{self.meter.token_saving:.2f}x token saving: {TOKEN_SAVING}", file=sys.stderr)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        bar = getattr(self, "training_bar", None)
        if bar is not None and logs:
            shown = {name: f"{value:.4g}" for name, value in logs.items() if isinstance(value, float)}
            bar.write(json.dumps({"step": state.global_step, **shown}), file=sys.stderr)


def _metrics_path(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".") / METRICS_FILE


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line truncated when the run was killed
