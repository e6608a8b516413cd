"""Computes log-probs or rewards from hidden states through the model's own head."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpref.models.head_form import HeadForm, head_form
from kvpref.models.output_layer import head_module, is_reward_model
from kvpref.models.own_call import call_with
from kvpref.models.own_head import check_logit_ids, own_logits, own_rewards, own_statistics
from kvpref.models.value_head import value_head
from kvpref.models.vocabulary_grads import grad_in_place
from kvpref.ops.logprob.statistics import HeadParams, token_statistics
from kvpref.records.host_copies import to_device
from kvpref.records.requests import HeadOptions

_MAX_TILE_BYTES = 64 * 2**20


def head_outputs(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    options: HeadOptions,
    *,
    in_place: bool = False,
) -> dict[str, torch.Tensor]:
    """The model's head applied to hidden states.

    Args:
        model: An attached model.
        hidden: (U, hidden_size).
        targets: (U,) int64, the tokens that they predict; ignored by reward models.
        options: What to compute besides log-probs.
        in_place: Whether the backward pass adds the LM head's gradient to its `.grad` itself, where possible.

    Returns:
        Values by the names of `ResponseLogps`, U each; ``rewards`` alone for a reward model. At least fp32.
    """
    form = head_form(model)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if is_reward_model(model):
        rewards = head_module(model)(hidden).squeeze(-1) if form.fused else own_rewards(model, hidden)
        return {"rewards": rewards.to(wide)}
    if form.fused:
        head = head_module(model)
        found = call_with(
            head, lambda rows: _fused_statistics(head, rows, targets, options, form, in_place=in_place), hidden
        )
    else:
        found = own_statistics(model, hidden, targets, options)
    if options.hidden:
        found["hidden"] = hidden
    if options.values:
        found["values"] = value_head(model)(hidden).squeeze(-1).to(wide)
    return found


@torch.no_grad()
def most_likely_tokens(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The token with the largest logit for each of U rows: (U, hidden_size) -> (U,); computed a few rows at a time."""
    form, head = head_form(model), head_module(model)
    vocab_size = model.config.get_text_config().vocab_size
    rows_at_once = max(1, _MAX_TILE_BYTES // (vocab_size * torch.float32.itemsize))

    def tokens(hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([_logits(model, form, rows).argmax(dim=-1) for rows in hidden.split(rows_at_once)])

    # One call of the head even without rows: its wrappers communicate with other ranks in each.
    return call_with(head, tokens, hidden) if form.fused else tokens(hidden)


def _logits(model: PreTrainedModel, form: HeadForm, hidden: torch.Tensor) -> torch.Tensor:
    if not form.fused:
        return own_logits(model, hidden)
    head = head_module(model)
    return form.logits(nn.functional.linear(hidden, head.weight, head.bias))


def _fused_statistics(
    head: nn.Linear,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    options: HeadOptions,
    form: HeadForm,
    *,
    in_place: bool,
) -> dict[str, torch.Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    params = HeadParams(
        logit_scale=form.logit_scale,
        softcap=form.softcap,
        temperature=options.temperature,
        entropy=options.entropy,
        collision=options.collision,
        # Without a cap there is a shortcut.
        mean_logits=options.mean_logits and form.softcap is not None,
    )
    weight_grad = grad_in_place(head.weight) if in_place else None
    statistics = token_statistics(hidden, head.weight, targets, bias=head.bias, params=params, weight_grad=weight_grad)
    found = {
        "token_logps": statistics.logps,
        "entropy": statistics.entropy,
        "collision": statistics.collision,
        "mean_logits": statistics.mean_logits,
    }
    with torch.autocast(hidden.device.type, enabled=False):
        if options.mean_logits and form.softcap is None:
            found["mean_logits"] = form.logits(_mean_logits(head, hidden.to(wide))) / options.temperature
        if options.logit_ids:
            logits = _logits_of_ids(head, hidden.to(wide), options.logit_ids)
            found["logits"] = form.logits(logits) / options.temperature
    return {name: value for name, value in found.items() if value is not None}


@torch.no_grad()
def _mean_logits(head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """The mean over the vocabulary, computed by a linear layer whose only row is the mean of all rows."""
    mean = hidden @ head.weight.mean(0, dtype=hidden.dtype)
    return mean if head.bias is None else mean + head.bias.mean(dtype=hidden.dtype)


def _logits_of_ids(head: nn.Linear, hidden: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
    check_logit_ids(ids, head.weight.shape[0])
    rows = to_device(torch.tensor(ids), hidden.device)
    bias = None if head.bias is None else head.bias[rows].to(hidden.dtype)
    return nn.functional.linear(hidden, head.weight[rows].to(hidden.dtype), bias)
