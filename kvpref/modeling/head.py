"""From hidden states to log-probs through the model's own head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from kvpref.errors import UnsupportedModelError
from kvpref.logprob import HeadParams, token_logprobs
from kvpref.modeling.families import FAMILIES
from kvpref.modeling.vocabulary_grads import grad_in_place

_NUM_PROBES = 3
# Two evaluations of one linear layer, in the model's own dtype, differ by rounding only.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
_TOLERANCE_16_BIT = 2e-2


def head_params(model: PreTrainedModel) -> HeadParams:
    """The transform between LM head and logits that the model's family declares."""
    return HeadParams(logit_scale=FAMILIES[model.config.model_type].logit_scale(model.config))


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that makes the logits; the trained copy where PEFT keeps one (`modules_to_save`).

    Raises:
        UnsupportedModelError: If it is anything but a linear layer: an adapter on the head would be left out.
    """
    head: Any = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        head = head.original_module if head.disable_adapters else copies[head.active_adapters[0]]
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"the LM head is a {type(head).__module__}.{type(head).__name__}; kvpref needs a torch.nn.Linear. With "
            "PEFT, take lm_head out of target_modules, or train it whole with modules_to_save"
        )
    return head


def head_logps(
    model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor, *, in_place: bool = False
) -> torch.Tensor:
    """Log-probs of `targets` (U,) from `hidden` (U, hidden_size); (U,) fp32, or fp64 for fp64 models.

    With `in_place`, the backward pass adds the weight's gradient to its `.grad` itself, where it can.
    """
    head = output_head(model)
    weight_grad = grad_in_place(head.weight) if in_place else None
    return token_logprobs(
        hidden, head.weight, targets, bias=head.bias, params=head_params(model), weight_grad=weight_grad
    )


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
    hidden = torch.randn(1, _NUM_PROBES, head.in_features, generator=generator).to(head.weight)
    logits = _logits_of(model, hidden).float()
    expected = head(hidden).float() * head_params(model).logit_scale
    tolerance = _TOLERANCE.get(head.weight.dtype, _TOLERANCE_16_BIT)
    scale = expected.abs().max().clamp(min=1e-30)
    if logits.shape != expected.shape or (logits - expected).abs().max() > tolerance * scale:
        raise UnsupportedModelError(
            f"{type(model).__name__} transforms its logits (softcap, scale or norm) in a way that kvpref does not "
            "know; the log-probs would be wrong"
        )


def _logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The model's logits for given final hidden states (1, n, hidden_size)."""
    backbone = model.base_model
    saved = backbone.__dict__.get("forward")
    backbone.forward = lambda *args, **kwargs: BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
    try:
        input_ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        logits: torch.Tensor = model(input_ids=input_ids, use_cache=False, return_dict=True).logits
        return logits
    finally:
        del backbone.forward
        if saved is not None:
            backbone.forward = saved
