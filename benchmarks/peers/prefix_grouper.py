"""PrefixGrouper (https://github.com/johncaged/PrefixGrouper, arXiv 2506.05433): one row per group, prompt|chosen|
rejected, attention of the prompt and of the responses (each with a copy of the prompt's keys) in two calls.

Its own transformers registration hands 2-D masks to FlashAttention-2, which needs CUDA. Here `PrefixGrouper.forward`
gets scaled_dot_product_attention with the masks that FlashAttention-2 would imply, as its README asks of other
attention functions. The LM head runs on scored tokens only, which is kinder than its README's `res.logits`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from one_row import split_pair
from torch.nn.functional import scaled_dot_product_attention

from kvpref.models.shape import model_shape
from kvpref.plan.flops import Work
from kvpref.records.groups import Group
from peers.interface import Peer, Runner, StepWork
from peers.loop import TrainingLoop, plain_head_logps
from peers.ours import KvprefLoop
from peers.task import Task

ATTENTION_NAME = "peer_prefix_grouper"


class PrefixGrouperPeer(Peer):
    """The package from PyPI around a transformers model, in a plain loop."""

    name = "prefix_grouper"
    description = (
        "prefix-grouper's split attention over sdpa in a plain loop, LM head on scored tokens. Counted: rows padded to "
        "the longest prompt+responses through all layers, attention over padded prompt squares and padded response x "
        "(prompt + response) rectangles, LM head on scored tokens"
    )

    def missing(self) -> str | None:
        """As in `Peer`."""
        found = importlib.util.find_spec("prefix_grouper")
        return None if found else "prefix-grouper is not installed (pip install 'kvpref[bench]')"

    def runner(self, task: Task) -> Runner:
        """As in `Peer`."""
        return PrefixGrouperLoop(task)

    def opponent(self, task: Task) -> Runner:
        """As in `Peer`."""
        return KvprefLoop(task)


class PrefixGrouperLoop(TrainingLoop):
    """A model whose attention goes through `PrefixGrouper.forward`."""

    def __init__(self, task: Task) -> None:
        from transformers import AttentionInterface

        super().__init__(task)
        AttentionInterface.register(ATTENTION_NAME, _attention)
        self.model.set_attn_implementation(ATTENTION_NAME)

    def sequence_logps(self, groups: Sequence[Group]) -> torch.Tensor:
        """As in `TrainingLoop`."""
        from prefix_grouper import PrefixGrouper

        device = self.task.device
        pairs = [split_pair(group) for group in groups]
        lengths = [[len(prompt), *map(len, responses)] for prompt, responses in pairs]
        grouper = PrefixGrouper(lengths, device=device, padding_mode="right")
        rows = [[*prompt, *(token for response in responses for token in response)] for prompt, responses in pairs]
        positions = [
            [*range(prompt), *(prompt + offset for length in responses for offset in range(length))]
            for prompt, *responses in lengths
        ]
        hidden = self.model.base_model(
            input_ids=_pad(rows, device),
            position_ids=_pad(positions, device),
            use_cache=False,
            prefix_grouper=grouper,
            masked_sdpa=_MaskedSdpa(),
        ).last_hidden_state
        _, _, suffix, mask = grouper.split_output(hidden, include_prefix_last=1)
        # A row of `suffix` starts with the prompt's last state, so state i predicts response token i.
        targets = _pad([response for _, responses in pairs for response in responses], device)
        scored = mask[:, 1:]
        token_logps = plain_head_logps(self.model, suffix[:, :-1][scored], targets[scored])
        return hidden.new_zeros(scored.shape).masked_scatter(scored, token_logps).sum(1)

    def work(self) -> list[StepWork]:
        """As in `Runner`."""
        return [self._work_of(step) for step in range(len(self.task.batches))]

    def _work_of(self, step: int) -> StepWork:
        lengths = [
            [len(prompt), *map(len, responses)] for prompt, responses in map(split_pair, self.task.step_groups(step))
        ]
        prompt = max(length[0] for length in lengths)
        response = max(max(length[1:]) for length in lengths)
        num_responses = sum(len(length) - 1 for length in lengths)
        work = Work(
            num_tokens=len(lengths) * max(map(sum, lengths)),
            num_pairs=len(lengths) * prompt**2 + num_responses * response * (prompt + response),
            num_scored=sum(sum(length[1:]) for length in lengths),
        )
        flops = model_shape(self.model).flops(work)
        flops = flops._replace(head=flops.head * 3 // 4)  # the plain head keeps its logits for backward
        return StepWork(num_tokens=work.num_tokens, num_head_rows=work.num_scored, flops=flops)


def _pad(rows: Sequence[Sequence[int]], device: str) -> torch.Tensor:
    """(num_rows, longest) int64, zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


class _MaskedSdpa:
    """Attention for `PrefixGrouper.forward`; makes each of the two masks once per forward of the model."""

    def __init__(self) -> None:
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """query (B, H, Q, D); key, value (B, G, K, D); key_mask (B, K) bool -> (B, Q, H, D)."""
        shape = (query.shape[2], key.shape[2])
        if shape not in self._masks:
            self._masks[shape] = _causal_mask(*shape, key_mask)
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=self._masks[shape], scale=scale, enable_gqa=key.shape[1] != query.shape[1]
        )
        return out.transpose(1, 2)


def _causal_mask(num_queries: int, num_keys: int, key_mask: torch.Tensor) -> torch.Tensor:
    """(B, 1, Q, K) bool: the queries are the last of the keys. A query sees itself even in padding, against NaN."""
    last = torch.arange(num_queries, device=key_mask.device).unsqueeze(1) + num_keys - num_queries
    keys = torch.arange(num_keys, device=key_mask.device)
    return ((keys <= last) & key_mask[:, None, None, :]) | (keys == last)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prefix_grouper: Any,
    masked_sdpa: _MaskedSdpa,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers: query (B, H, T, D); key, value (B, G, T, D) -> (B, T, H, D)."""
    return prefix_grouper.forward(masked_sdpa, query, key, value, scaling), None
