"""All pairs of a batch in one row, prompt|chosen|rejected, under one block-sparse mask: the layout of
dpo-prefix-sharing (arXiv 2410.20305), through `torch.nn.attention.flex_attention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from one_row import OneRow
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kvpref.models.shape import model_shape
from kvpref.plan.flops import Work
from kvpref.records.groups import Group
from peers.interface import FirstBatch, Peer, Runner, StepWork
from peers.loop import TrainingLoop, plain_head_logps
from peers.ours import KvprefLoop
from peers.task import Task

ATTENTION_NAME = "peer_flex_attention"


class FlexAttentionPeer(Peer):
    """One row per batch, compiled flex_attention, in a plain loop."""

    name = "flex_attention"
    description = (
        "one row prompt|chosen|rejected per batch under a block mask, torch's flex_attention (compiled on CUDA), LM "
        "head on scored tokens. Counted: all tokens of the row through all layers, attention pairs in blocks that are "
        "not empty, LM head on scored tokens"
    )

    def missing(self) -> str | None:
        """As in `Peer`."""
        return None

    def untimed(self, task: Task) -> str | None:
        """As in `Peer`: the reason that torch gives for having no backward here."""
        row = torch.zeros(1, 1, 16, 16, device=task.device, requires_grad=True)
        try:
            flex_attention(row, row, row).sum().backward()
        except NotImplementedError as error:
            return f"torch {torch.__version__}: {error}"
        return None

    def runner(self, task: Task) -> Runner:
        """As in `Peer`."""
        return FlexAttentionLoop(task, has_backward=self.untimed(task) is None)

    def opponent(self, task: Task) -> Runner:
        """As in `Peer`."""
        return KvprefLoop(task)


class FlexAttentionLoop(TrainingLoop):
    """A model whose attention is one flex_attention call per layer.

    Args:
        task: What to train on.
        has_backward: Whether flex_attention has a backward on the task's device.
    """

    def __init__(self, task: Task, has_backward: bool) -> None:
        from transformers import AttentionInterface

        super().__init__(task)
        self.has_backward = has_backward
        self._flex: Callable[..., Any] = torch.compile(flex_attention) if has_backward else flex_attention
        AttentionInterface.register(ATTENTION_NAME, _attention)
        self.model.set_attn_implementation(ATTENTION_NAME)

    def first_batch(self) -> FirstBatch:
        """As in `Runner`; without a gradient where there is no backward."""
        if self.has_backward:
            return super().first_batch()
        with torch.no_grad():
            logps = self.sequence_logps(self.task.step_groups(0))
            loss = self._loss(logps, torch.zeros_like(logps))
        return FirstBatch(logps=logps.float().cpu(), loss=loss.item(), gradient=None)

    def sequence_logps(self, groups: Sequence[Group]) -> torch.Tensor:
        """As in `TrainingLoop`."""
        device = self.task.device
        row = OneRow(groups, device)
        hidden = self.model.base_model(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            use_cache=False,
            flex=self._flex,
            block_mask=row.block_mask(),
        ).last_hidden_state
        token_logps = plain_head_logps(self.model, hidden[0, row.predictors], row.targets)
        return torch.segment_reduce(token_logps, "sum", lengths=row.response_lengths)

    def work(self) -> list[StepWork]:
        """As in `Runner`."""
        return [self._work_of(step) for step in range(len(self.task.batches))]

    def _work_of(self, step: int) -> StepWork:
        row = OneRow(self.task.step_groups(step), self.task.device)
        mask = row.block_mask()
        num_blocks = mask.kv_num_blocks.sum() + (
            0 if mask.full_kv_num_blocks is None else mask.full_kv_num_blocks.sum()
        )
        work = Work(
            num_tokens=row.input_ids.numel(),
            num_pairs=int(num_blocks) * mask.BLOCK_SIZE[0] * mask.BLOCK_SIZE[1],
            num_scored=len(row.targets),
        )
        flops = model_shape(self.model).flops(work)
        flops = flops._replace(head=flops.head * 3 // 4)  # the plain head keeps its logits for backward
        return StepWork(num_tokens=work.num_tokens, num_head_rows=work.num_scored, flops=flops)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    flex: Callable[..., torch.Tensor],
    block_mask: BlockMask,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers: query (1, H, T, D); key, value (1, G, T, D) -> (1, T, H, D)."""
    out = flex(query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=key.shape[1] != query.shape[1])
    return out.transpose(1, 2), None
