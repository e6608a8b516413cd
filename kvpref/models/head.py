"""From hidden states to log-probs or rewards through the model's own head."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch._subclasses import FakeTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from kvpref.errors import InputError, UnsupportedModelError
from kvpref.models.families import FAMILIES
from kvpref.models.value_head import trained_copy, value_head
from kvpref.models.vocabulary_grads import grad_in_place
from kvpref.ops.logprob.statistics import HeadParams, token_statistics
from kvpref.records.host_copies import to_device
from kvpref.records.requests import HeadOptions

_NUM_PROBES = 3
# Two evaluations of one linear layer, in the model's own dtype, differ by rounding only.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
_TOLERANCE_16_BIT = 2e-2


def head_params(model: PreTrainedModel) -> HeadParams:
    """The transform between LM head and logits that the model's family declares."""
    return HeadParams(logit_scale=FAMILIES[model.config.model_type].logit_scale(model.config))


def is_reward_model(model: PreTrainedModel) -> bool:
    """Whether the model ends in a scalar head instead of an LM head."""
    return type(model).__name__.endswith("ForSequenceClassification")


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that makes the logits, or the reward; the trained copy where PEFT keeps one.

    Raises:
        UnsupportedModelError: If it is anything but a linear layer: an adapter on the head would be left out.
    """
    head = trained_copy(model.score if is_reward_model(model) else model.get_output_embeddings())
    if not isinstance(head, nn.Linear):
        name = "score" if is_reward_model(model) else "lm_head"
        raise UnsupportedModelError(
            f"the head is a {type(head).__module__}.{type(head).__name__}; kvpref needs a torch.nn.Linear. With "
            f"PEFT, take {name} out of target_modules (and leave trainable_token_indices out where it is tied to the "
            "embeddings), or train it whole with modules_to_save"
        )
    return head


def head_outputs(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    options: HeadOptions,
    *,
    in_place: bool = False,
) -> dict[str, torch.Tensor]:
    """What the model's head makes of some hidden states.

    Args:
        model: Attached.
        hidden: (U, hidden_size).
        targets: (U,) int64, the tokens that they predict; not read by reward models.
        options: What is wanted besides log-probs.
        in_place: The backward pass adds the LM head's gradient to its `.grad` itself, where it can.

    Returns:
        By the names of `ResponseLogps`, U values each; ``rewards`` alone for a reward model. Computed at least in fp32.
    """
    head = output_head(model)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if is_reward_model(model):
        return {"rewards": head(hidden).squeeze(-1).to(wide)}
    own = head_params(model)
    scale = own.logit_scale / options.temperature
    params = replace(own, logit_scale=scale, entropy=options.entropy, collision=options.collision)
    weight_grad = grad_in_place(head.weight) if in_place else None
    statistics = token_statistics(hidden, head.weight, targets, bias=head.bias, params=params, weight_grad=weight_grad)
    found = {"token_logps": statistics.logps, "entropy": statistics.entropy, "collision": statistics.collision}
    with torch.autocast(hidden.device.type, enabled=False):
        if options.mean_logits:
            found["mean_logits"] = _mean_logits(head, hidden.to(wide)) * scale
        if options.logit_ids:
            found["logits"] = _logits_of_ids(head, hidden.to(wide), options.logit_ids) * scale
    if options.hidden:
        found["hidden"] = hidden
    if options.values:
        found["values"] = value_head(model)(hidden).squeeze(-1).to(wide)
    return {name: value for name, value in found.items() if value is not None}


@torch.no_grad()
def _mean_logits(head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """The mean over the vocabulary is that of one linear layer whose row is the mean of all rows."""
    mean = hidden @ head.weight.mean(0, dtype=hidden.dtype)
    return mean if head.bias is None else mean + head.bias.mean(dtype=hidden.dtype)


def _logits_of_ids(head: nn.Linear, hidden: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
    vocab_size = head.weight.shape[0]
    if not all(0 <= index < vocab_size for index in ids):
        raise InputError(f"logit_ids must lie in [0, {vocab_size}), the vocabulary; got {ids}")
    rows = to_device(torch.tensor(ids), hidden.device)
    bias = None if head.bias is None else head.bias[rows].to(hidden.dtype)
    return nn.functional.linear(hidden, head.weight[rows].to(hidden.dtype), bias)


@torch.no_grad()
def verify_head(model: PreTrainedModel) -> None:
    """Run the model's own forward on made-up hidden states and compare its logits with the fused path's.

    The layers are skipped, so this costs a few rows of the LM head, whatever the size of the model.

    Raises:
        UnsupportedModelError: If the model does to its logits something else than its family declares.
    """
    head = output_head(model)
    if head.weight.is_meta or isinstance(head.weight, FakeTensor):
        return  # nothing to compare; the weights will be checked when the materialised model is attached
    generator = torch.Generator().manual_seed(0)
    # Not the layer's in_features: PEFT's copy of a tied LM head has them the wrong way round.
    hidden = torch.randn(1, _NUM_PROBES, head.weight.shape[1], generator=generator).to(head.weight)
    logits = _logits_of(model, hidden).float()
    expected = head(hidden).float()
    # A reward model reads its last token.
    expected = expected[:, -1] if is_reward_model(model) else expected * head_params(model).logit_scale
    tolerance = _TOLERANCE.get(head.weight.dtype, _TOLERANCE_16_BIT)
    scale = expected.abs().max().clamp(min=1e-30)
    if logits.shape != expected.shape or (logits - expected).abs().max() > tolerance * scale:
        raise UnsupportedModelError(
            f"{type(model).__name__} transforms its logits (softcap, scale or norm) in a way that kvpref does not "
            "know; the results would be wrong"
        )


def _logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The model's logits for given final hidden states (1, n, hidden_size)."""
    backbone = model.base_model
    saved = backbone.__dict__.get("forward")
    backbone.forward = lambda *args, **kwargs: BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
    try:
        # Any token but padding, which a reward model passes over.
        token = 1 if model.config.pad_token_id == 0 else 0
        input_ids = torch.full(hidden.shape[:2], token, dtype=torch.int64, device=hidden.device)
        logits: torch.Tensor = model(input_ids=input_ids, use_cache=False, return_dict=True).logits
        return logits
    finally:
        del backbone.forward
        if saved is not None:
            backbone.forward = saved
