"""Whole training steps, forward, backward, AdamW and zeroing the gradients: modes that share against `packed`.

Pairs train with DPO and precomputed reference log-probs, larger groups with a loss of the best response against the
rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from mode_rows import measure_modes
from options import SweepOptions
from real_data import real_files
from workloads import Workload, gpu_grid, length_statistics

from kvpref import Batch, Group, LossOutput, ResponseLogps
from kvpref.losses import DPO, LossFunction, PreferenceLoss
from kvpref.profiling.compare.comparison import Comparison

TITLE = "training step: forward, backward, AdamW"


def rows(options: SweepOptions) -> dict[str, Callable[[], Comparison]]:
    """Name -> what measures that row."""
    if options.gpu_rows:
        # On a GPU the bars apply to forward and backward; the pairs show what the optimizer adds.
        builders = {name: build for name, build in gpu_grid(options).items() if name.endswith("/2")}
    else:
        builders = real_files(options) | length_statistics(options)
    return {
        name: partial(measure_modes, name, build, options, loss=choose_loss, with_optimizer=True)
        for name, build in builders.items()
    }


def choose_loss(workload: Workload) -> PreferenceLoss | LossFunction:
    """DPO if every group is a pair, otherwise the best response against the rest."""
    is_pairs = all(len(group) == 2 for groups in workload.cuts["two_pass"] for group in groups)
    return DPO(beta=0.1) if is_pairs else best_vs_rest


def best_vs_rest(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
    """Mean over groups of ``-log sigmoid(m_best - mean of the other m)``, m the log-prob per token of a response.

    The best response is the first with the highest score; unrated ones come last.
    """
    losses = []
    for group, means in zip(batch.groups, policy.mean().split([len(group) for group in batch.groups]), strict=True):
        best = _best_index(group)
        rest = (means.sum() - means[best]) / max(1, len(group) - 1)
        losses.append(-torch.nn.functional.logsigmoid(means[best] - rest))
    return LossOutput(torch.stack(losses).mean(), metrics={})


def _best_index(group: Group) -> int:
    scores = [float("-inf") if score is None else score for score in group.scores or (0.0,) * len(group)]
    return scores.index(max(scores))
