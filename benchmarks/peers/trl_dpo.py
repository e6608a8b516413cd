"""TRL's `DPOTrainer` (https://github.com/huggingface/trl): padded rows, each prompt twice."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PrinterCallback

from kvpref.models.shape import model_shape
from kvpref.plan.flops import Flops, Work
from peers.interface import DisagreementError, FirstBatch, Peer, Runner, StepWork, flat_gradient
from peers.ours import KvprefTrainer, trainer_settings
from peers.task import Batching, Task
from peers.trainer_steps import trainer_steps

TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "best": {"gradient_checkpointing": False},
    "default": {"gradient_checkpointing": True},
}
"""Arguments of `DPOConfig`. ``default`` is TRL's own but for what equal numbers need: float32 (TRL's default is bf16),
no cutting at `max_length`. ``best`` keeps activations and sorts by length; 1.16 has no other setting that makes the CPU
faster (`padding_free` is switched off inside, the fused LM head is always on)."""

_BATCHING: dict[str, Batching] = {"default": "random", "best": "group_by_length"}
_SCORED_ONLY_DEVICES = ("cuda", "xpu")


class TrlPeer(Peer):
    """`DPOTrainer` with precomputed reference log-probs.

    Args:
        setting: A name in `TRL_SETTINGS`.
    """

    def __init__(self, setting: str) -> None:
        self.setting = setting
        self.name = f"trl_{setting}"
        self.batching = _BATCHING[setting]
        self.description = (
            f"trl.DPOTrainer, {TRL_SETTINGS[setting]}, batches {self.batching}, sdpa, float32, references precomputed. "
            "Counted: padded rows through all layers, attention over the full square of each row, LM head on every "
            "position but the last (on CUDA: on scored tokens), computed again in backward"
            + ("; layers computed again in backward" if TRL_SETTINGS[setting]["gradient_checkpointing"] else "")
        )

    def missing(self) -> str | None:
        """As in `Peer`."""
        return None if importlib.util.find_spec("trl") else "trl is not installed (pip install 'kvpref[bench]')"

    def runner(self, task: Task) -> Runner:
        """As in `Peer`."""
        assert self.setting is not None
        return TrlTrainer(task, TRL_SETTINGS[self.setting])

    def opponent(self, task: Task) -> Runner:
        """As in `Peer`."""
        return KvprefTrainer(task)


class TrlTrainer(Runner):
    """One `DPOTrainer`. It computes the reference log-probs when it is made, and may find them in its own cache.

    Raises:
        DisagreementError: If TRL's tokens are not the task's.
    """

    def __init__(self, task: Task, settings: dict[str, Any]) -> None:
        self.task = task
        self.checkpointing = bool(settings["gradient_checkpointing"])
        self.optimizer_seconds: list[float] = []
        self.trainer, self.precompute_seconds = _make_trainer(task, settings)
        check_tokens(self.trainer.train_dataset, task)

    def first_batch(self) -> FirstBatch:
        """As in `Runner`."""
        trainer, model = self.trainer, self.trainer.model
        num_pairs = len(self.task.batches[0])
        inputs = trainer.data_collator([trainer.train_dataset[index] for index in range(num_pairs)])
        inputs = {name: value.to(self.task.device) for name, value in inputs.items()}
        chosen, rejected = trainer.compute_ref_log_probs(model, inputs)
        zeros = torch.zeros(num_pairs, device=self.task.device)
        model.train()
        loss = trainer.compute_loss(model, {**inputs, "ref_chosen_logps": zeros, "ref_rejected_logps": zeros})
        loss.backward()
        logps = torch.stack([chosen, rejected], dim=1).flatten()
        return FirstBatch(logps=logps.float().cpu(), loss=loss.item(), gradient=flat_gradient(model))

    def steps(self) -> Iterator[float]:
        """As in `Runner`."""
        return trainer_steps(self.trainer, self.optimizer_seconds)

    def work(self) -> list[StepWork]:
        """As in `Runner`."""
        return [self._work_of(step) for step in range(len(self.task.batches))]

    def _work_of(self, step: int) -> StepWork:
        sequences = [sequence for group in self.task.step_groups(step) for sequence in group.sequences]
        num_rows, width = len(sequences), max(map(len, sequences))
        if self.task.device in _SCORED_ONLY_DEVICES:
            num_head_rows = sum(sum(sequence.scored) for sequence in sequences)
        else:
            num_head_rows = num_rows * (width - 1)
        work = Work(num_tokens=num_rows * width, num_pairs=num_rows * width**2, num_scored=num_head_rows)
        flops = model_shape(self.trainer.model).flops(work)
        if self.checkpointing:
            # One more forward: 1 product on top of 3 for linear layers, 2 on top of 7 for attention.
            flops = Flops(linear=flops.linear * 4 // 3, attention=flops.attention * 9 // 7, head=flops.head)
        return StepWork(num_tokens=work.num_tokens, num_head_rows=num_head_rows, flops=flops)


def _make_trainer(task: Task, settings: dict[str, Any]) -> tuple[Any, float]:
    """A `DPOTrainer` on the task's batches in their order, and the seconds that its reference log-probs took."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    seconds: list[float] = []

    class TimedTrainer(DPOTrainer):
        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            started = time.perf_counter()
            logps = super().compute_ref_log_probs(model, inputs)
            seconds.append(time.perf_counter() - started)
            return logps

    args = DPOConfig(
        output_dir=str(task.work_dir / "trl"),
        beta=task.beta,
        max_length=None,
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
        **settings,
        **trainer_settings(task),
    )
    rows = [task.rows[index] for batch in task.batches for index in batch]
    trainer = TimedTrainer(
        model=task.make_model(), args=args, train_dataset=Dataset.from_list(rows), processing_class=task.tokenizer
    )
    trainer.remove_callback(PrinterCallback)  # stdout is the report's
    return trainer, sum(seconds)


def check_tokens(dataset: Any, task: Task) -> None:
    """Compare TRL's prompt and response tokens with the task's, pair by pair.

    Raises:
        DisagreementError: Naming the first pair that differs.
    """
    groups = [group for step in range(len(task.batches)) for group in task.step_groups(step)]
    if len(dataset) != len(groups):
        raise DisagreementError(f"TRL kept {len(dataset)} pairs of {len(groups)}")
    for row, group in zip(dataset, groups, strict=True):
        for name, sequence in zip(("chosen_ids", "rejected_ids"), group.sequences, strict=True):
            ids = row["prompt_ids"] + row[name]
            scored = [False] * len(row["prompt_ids"]) + [True] * len(row[name])
            if ids != list(sequence.input_ids) or scored != list(sequence.scored):
                raise DisagreementError(f"{group.id}: TRL's {name} are not kvpref's tokens")
