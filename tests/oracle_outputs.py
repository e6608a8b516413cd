"""What losses read, the naive way: each sequence alone in a batch of one, full logits."""

from __future__ import annotations

import torch
from torch import nn

import kvpref
from kvpref import Batch, HeadOptions, ResponseLogps, ResponseRewards


def naive_outputs(model: nn.Module, batch: Batch, head: HeadOptions) -> dict[str, torch.Tensor]:
    """Everything that `head` asks for, by the names of `ResponseLogps`, in the graph of an untouched model."""
    rows = [_outputs(model, sequence, head) for sequence in batch.sequences]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def naive_responses(model: nn.Module, batch: Batch, head: HeadOptions) -> ResponseLogps:
    """The same as a loss sees it."""
    found = naive_outputs(model, batch, head)
    weights = batch.token_weights(found["token_logps"].dtype)
    return ResponseLogps(cu_seqlens=batch.cu_seqlens, group_index=batch.group_index, weights=weights, **found)


def naive_rewards(model: nn.Module, batch: Batch) -> ResponseRewards:
    """Rewards of transformers' own reward model."""
    rows = [torch.tensor([sequence.input_ids]) for sequence in batch.sequences]
    return ResponseRewards(
        torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows]), batch.group_index
    )


def _outputs(model: nn.Module, sequence: kvpref.Sequence, head: HeadOptions) -> dict[str, torch.Tensor]:
    ids = torch.tensor([sequence.input_ids])
    scored = torch.tensor(sequence.scored[1:], dtype=torch.bool)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1][scored] / head.temperature
    logps = logits.log_softmax(-1)
    found = {"token_logps": logps.gather(1, ids[0, 1:, None][scored]).squeeze(1)}
    if head.entropy:
        found["entropy"] = -(logps.exp() * logps).sum(-1)
    if head.collision:
        found["collision"] = logps.exp().square().sum(-1).log().detach()
    if head.mean_logits:
        found["mean_logits"] = logits.mean(-1).detach()
    if head.logit_ids:
        found["logits"] = logits[:, list(head.logit_ids)]
    if head.hidden or head.values:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1][scored]
        found |= {"hidden": hidden} if head.hidden else {}
        found |= {"values": model.value_head(hidden).squeeze(-1)} if head.values else {}
    return found
