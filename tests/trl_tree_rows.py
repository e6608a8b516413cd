"""Samples for TRL's AsyncGRPOTrainer, its tree rows, and its attention without a CUDA kernel."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import agent_rows
import numpy as np
import torch
import trl_runs
from datasets import Dataset
from trl.experimental.async_grpo import async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

Sample = dict[str, Any]


def samples(rows: list[agent_rows.Row]) -> list[Sample]:
    """Rows of agents with old log-probs and an advantage each, two per group."""
    random = np.random.default_rng(5)
    return [
        {
            "input_ids": np.array(ids),
            "completion_mask": np.array(flags),
            "old_log_probs": random.normal(-3.0, 1.0, len(ids)) * flags,
            "advantage": float(random.normal()),
            "group_id": index // 2,
            "metrics": {"reward": float(index)},
        }
        for index, (ids, flags) in enumerate(rows)
    ]


def packed(rows: list[agent_rows.Row]) -> dict[str, torch.Tensor]:
    """The row that TRL makes of them."""
    row = packing.TreeRow()
    for sample in samples(rows):
        row.add(sample)
    made: dict[str, torch.Tensor] = row.pack()
    return made


class StandInKernel:
    """`flash_attn_varlen_func` of FlashAttention 3, for TRL's one call of it: causal, aligned at the bottom right."""

    @staticmethod
    def flash_attn_varlen_func(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
    ) -> torch.Tensor:
        assert causal
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert max_seqlen_k == int(cu_seqlens_k.diff().max())
        repeats, found = query.shape[1] // key.shape[1], []
        bounds = [cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:]]
        for first, stop, first_key, stop_key in zip(*(bound.tolist() for bound in bounds), strict=True):
            keys, values = (x[first_key:stop_key].repeat_interleave(repeats, 1) for x in (key, value))
            scores = torch.einsum("qhd,khd->hqk", query[first:stop], keys) * softmax_scale
            distance = torch.arange(stop_key - first_key - (stop - first), stop_key - first_key)[
                :, None
            ] - torch.arange(stop_key - first_key)
            hidden = distance < 0
            if window_size[0] >= 0:
                hidden |= distance > window_size[0]
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            found.append(torch.einsum("hqk,khd->qhd", weights, values))
        return torch.cat(found)


@contextmanager
def stand_in_kernel() -> Iterator[None]:
    """TRL's own attention runs here, on the CPU."""
    with mock.patch.object(packing, "_flash_attn", return_value=StandInKernel):
        yield


class Worker:
    """Hands out the same rollouts again and again, of the policy version that is asked for."""

    def __init__(self) -> None:
        self.rollout_buffer: Any = self
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        self._version = 0
        rows = [*agent_rows.calls_that_nest(), *agent_rows.attempts_that_branch()]
        self._samples = self._endless(samples(rows))

    def _endless(self, given: list[Sample]) -> Iterator[RolloutSample]:
        while True:
            for sample in given:
                yield RolloutSample(prompt=[], completion=[], model_version=self._version, **sample)

    def get(self, timeout: float) -> RolloutSample:
        return next(self._samples)

    def qsize(self) -> int:
        return 0

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def update_model_version(self, model_version: int) -> None:
        self._version = model_version

    def check_health(self, stale_after_s: float) -> None: ...


class NoTransfer:
    """Weights go nowhere."""

    def init_weight_transfer(self) -> None: ...

    def pause(self) -> None: ...

    def send_weights(self, iterator: Iterator[Any]) -> None:
        for _ in iterator:
            pass

    def resume(self) -> None: ...

    def destroy(self) -> None: ...


def rollouts() -> dict[str, Any]:
    """What `AsyncGRPOTrainer` is given besides a model and arguments, without a server."""
    return {
        "reward_funcs": len,
        "train_dataset": Dataset.from_list([{"prompt": "w3"}]),
        "processing_class": trl_runs.make_tokenizer(),
        "rollout_worker": Worker(),
        "weight_transfer": NoTransfer(),
    }


@contextmanager
def without_cuda_and_server() -> Iterator[None]:
    """TRL asks the CUDA device for its name, to report a share of its peak, and makes a client for vLLM."""
    with (
        mock.patch.object(async_grpo_trainer, "get_peak_flops_per_device", return_value=None),
        mock.patch.object(async_grpo_trainer, "VLLMClient"),
    ):
        yield
