"""Gradients of the two weights that are as large as the vocabulary, added in place.

Autograd delivers such a gradient as a separate full tensor, whatever the number of tokens; with a tied LM head, three
at once. A chunk of the bounded schedule may be small by comparison, so its embedding and LM head add to `.grad`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kvpref.tracing import mark


def grad_in_place(weight: torch.Tensor) -> torch.Tensor | None:
    """The `.grad` of a weight, created if missing; None if autograd has to deliver the gradient.

    That is the case if the weight is not trained, or has hooks, which must see its gradient.
    """
    if type(weight) is not nn.Parameter or not weight.requires_grad or not torch.is_grad_enabled():
        return None
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
        mark("gradients", weight.grad)
    return weight.grad if weight.grad.dtype == weight.dtype and not weight.grad.is_sparse else None


def embed(
    embedding: nn.Module, input_ids: torch.Tensor, unique_ids: torch.Tensor, inverse: torch.Tensor
) -> torch.Tensor:
    """``embedding(input_ids)``, whose gradient is added in place where possible.

    Args:
        embedding: The model's input embeddings.
        input_ids: (1, T) int64.
        unique_ids: (U,) int64, the distinct ids among them.
        inverse: (T,) int64, where each id stands in `unique_ids`.

    Returns:
        (1, T, hidden_size).
    """
    grad = grad_in_place(embedding.weight) if _is_plain(embedding) else None  # type: ignore[arg-type]
    if grad is None:
        looked_up: torch.Tensor = embedding(input_ids)
        return looked_up
    # As in autograd's own lookup, the padding row gets no gradient.
    receives = unique_ids != (-1 if embedding.padding_idx is None else embedding.padding_idx)
    embeds: torch.Tensor = _Embed.apply(embedding.weight, input_ids, unique_ids, inverse, receives, grad)
    return embeds


def _is_plain(embedding: nn.Module) -> bool:
    """Whether it is a plain lookup: families that scale, and adapters, have their own classes."""
    return type(embedding) is nn.Embedding and embedding.max_norm is None and not embedding.scale_grad_by_freq


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        input_ids: torch.Tensor,
        unique_ids: torch.Tensor,
        inverse: torch.Tensor,
        receives: torch.Tensor,
        weight_grad: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(unique_ids, inverse, receives)
        ctx.weight_grad = weight_grad
        return functional.embedding(input_ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
        unique_ids, inverse, receives = ctx.saved_tensors
        # A frequent token's gradient is summed in fp32 and rounded once.
        wide = torch.promote_types(grad.dtype, torch.float32)
        sums = grad.new_zeros(unique_ids.shape[0], grad.shape[-1], dtype=wide)
        sums.index_add_(0, inverse, grad.flatten(0, 1).to(wide))
        sums *= receives.unsqueeze(1)
        ctx.weight_grad.index_add_(0, unique_ids, sums.to(ctx.weight_grad.dtype))
        return None, None, None, None, None, None
