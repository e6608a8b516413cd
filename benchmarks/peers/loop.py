"""A plain training loop around anything that computes the responses' log-probs: DPO and AdamW, nothing else."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy, logsigmoid

from kvpref.records.groups import Group
from peers.interface import FirstBatch, Runner, flat_gradient
from peers.task import Task


class TrainingLoop(Runner):
    """Trains with the log-probs that `sequence_logps` computes.

    Args:
        task: What to train on.

    Attributes:
        model: From the task's initial weights; subclasses change its attention.
        optimizer_seconds: The optimizer's share of each step so far.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model: Any = task.make_model()
        self.optimizer_seconds: list[float] = []

    @abstractmethod
    def sequence_logps(self, groups: Sequence[Group]) -> torch.Tensor:
        """Log-prob of each whole response, (2 * num_pairs,), chosen and rejected of each pair."""

    def first_batch(self) -> FirstBatch:
        """As in `Runner`."""
        self.model.train()
        logps = self.sequence_logps(self.task.step_groups(0))
        loss = self._loss(logps, torch.zeros_like(logps))
        loss.backward()
        return FirstBatch(logps=logps.detach().float().cpu(), loss=loss.item(), gradient=flat_gradient(self.model))

    def steps(self) -> Iterator[float]:
        """As in `Runner`; reference log-probs are computed before the first step."""
        references = self._precompute()
        return self._steps(references)

    def _steps(self, references: list[torch.Tensor]) -> Iterator[float]:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.task.learning_rate, weight_decay=0.0, fused=True)
        self.model.train()
        for step, reference in enumerate(references):
            loss = self._loss(self.sequence_logps(self.task.step_groups(step)), reference)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            started = time.perf_counter()
            optimizer.step()
            self.optimizer_seconds.append(time.perf_counter() - started)
            optimizer.zero_grad()
            yield loss.item()

    def _precompute(self) -> list[torch.Tensor]:
        started = time.perf_counter()
        with torch.no_grad():
            references = [
                self.sequence_logps(self.task.step_groups(step)).detach() for step in range(len(self.task.batches))
            ]
        self.precompute_seconds = time.perf_counter() - started
        return references

    def _loss(self, logps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        chosen, rejected = (logps - reference).view(-1, 2).unbind(1)
        return -logsigmoid(self.task.beta * (chosen - rejected)).mean()


def plain_head_logps(model: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probs of `targets` (S,) from the hidden states (S, hidden_size) that predict them, with torch's own
    functions: (S, vocab_size) logits exist, for scored tokens only."""
    return -cross_entropy(model.get_output_embeddings()(hidden).float(), targets, reduction="none")
