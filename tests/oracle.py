"""The naive oracle: each sequence alone, batch 1, eager attention, full logits. All else is compared with it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import kvpref
from kvpref import Batch, Group
from kvpref.losses import LossFunction


class Result(NamedTuple):
    """What a run is judged by.

    Attributes:
        token_logps: (num_scored_tokens,), detached.
        grads: Per parameter, the gradient of the weighted sum of all token log-probs.
    """

    token_logps: torch.Tensor
    grads: dict[str, torch.Tensor]


class _TrueFloat64(TorchFunctionMode):
    """Model code asks for float32 in norms, softmax and rotary embeddings; on float64 tensors these become no-ops."""

    _CASTS = (torch.Tensor.to, torch.Tensor.type)
    _BACKWARDS = (torch.Tensor.backward, torch.autograd.backward)
    _SOFTMAXES = (functional.softmax, torch.softmax, torch.Tensor.softmax, functional.log_softmax, torch.log_softmax)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._BACKWARDS:
            # A mode is off inside the functions that it intercepts, and recomputed layers must see it.
            with (
                self,
                mock.patch("torch._tensor.has_torch_function_unary", return_value=False),
                mock.patch("torch.autograd.has_torch_function", return_value=False),
            ):
                return func(*args, **kwargs)
        subject = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if func is torch.Tensor.float and subject is not None:
            # Positions become floats before they are multiplied with the rotary frequencies.
            return subject.double()
        if subject is not None and subject.dtype == torch.float64:
            if func in self._CASTS:
                args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if func in self._CASTS + self._SOFTMAXES and kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def true_float64() -> Iterator[None]:
    """Run float64 models in float64 throughout, forward and (on CPU) backward with its recomputations.

    Model code upcasts to float32 in norms and softmax, which limits float64 agreement to 1e-7. The mode stays active
    in the backward pass of CPU tensors, because that runs on the calling thread.
    """
    with _TrueFloat64():
        yield


def precision(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """`true_float64` for a float64 model, nothing for others."""
    is_double = next(model.parameters()).dtype == torch.float64
    return true_float64() if is_double else contextlib.nullcontext()


def twin(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """An independent copy; call it before `kvpref.attach`."""
    copied = copy.deepcopy(model)
    return copied if dtype is None else copied.to(dtype)


def checkpoint_layers(model: nn.Module, use_reentrant: bool = False, **options: Any) -> nn.Module:
    """Checkpoint the layers, by the name that this release of transformers prefers; returns the model."""
    arguments = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments, **options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments, **options)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return model


def loss_weights(groups: list[Group]) -> torch.Tensor:
    """One random weight per scored token, so that no error can cancel in the sum; (num_scored_tokens,) float64."""
    num_scored = sum(part.num_scored for group in groups for part in group.parts)
    return torch.randn(num_scored, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def grads_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by parameter name; zeros where autograd left None."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def naive_token_logps(model: nn.Module, groups: list[Group]) -> torch.Tensor:
    """(num_scored_tokens,) log-probs of the scored tokens, each sequence alone in a batch of 1."""
    device = next(model.parameters()).device
    shares = []
    for sequence in (part for group in groups for part in group.parts):
        ids = torch.tensor([sequence.input_ids], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logps = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        shares.append(logps[torch.tensor(sequence.scored[1:], dtype=torch.bool, device=device)])
    return torch.cat(shares)


def _differentiate(model: nn.Module, token_logps: torch.Tensor, groups: list[Group]) -> Result:
    weights = loss_weights(groups).to(token_logps)
    if token_logps.requires_grad:
        (token_logps * weights).sum().backward()
    return Result(token_logps.detach(), grads_of(model))


def naive(model: nn.Module, groups: list[Group]) -> Result:
    """Log-probs and gradients of the untouched model."""
    assert model.config._attn_implementation == "eager"
    model.zero_grad(set_to_none=True)
    with precision(model):
        return _differentiate(model, naive_token_logps(model, groups), groups)


def shared(model: nn.Module, batch: Batch, *, mode: str = "two_pass", backend: str = "auto") -> Result:
    """Log-probs and gradients of an attached model."""
    model.zero_grad(set_to_none=True)
    with precision(model):
        logps = kvpref.response_logps(model, batch, mode=mode, backend=backend)
        return _differentiate(model, logps.token_logps, list(batch.groups))


def weighted_loss(
    policy: kvpref.ResponseLogps, reference: kvpref.ResponseLogps | None, batch: Batch
) -> kvpref.LossOutput:
    """The loss that `naive` differentiates."""
    return kvpref.LossOutput((policy.token_logps * loss_weights(list(batch.groups)).to(policy.token_logps)).sum(), {})


def scheduled(model: nn.Module, batch: Batch, loss: LossFunction = weighted_loss, **options: Any) -> Result:
    """Log-probs and gradients of `kvpref.forward_backward` with a loss and options."""
    seen: list[torch.Tensor] = []

    def spying_loss(policy: kvpref.ResponseLogps, reference: Any, batch: Batch) -> kvpref.LossOutput:
        seen.append(policy.token_logps.detach())
        return loss(policy, reference, batch)

    model.zero_grad(set_to_none=True)
    with precision(model):
        kvpref.forward_backward(model, batch, spying_loss, **options)
    assert len(seen) == 1
    return Result(seen[0], grads_of(model))


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over norm of the truth; infinite where only the truth is zero."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    if not truth.numel():
        return 0.0
    error, size = (found.double() - truth.double()).norm(), truth.double().norm()
    return float(error) if size == 0 else float(error / size)


def worst_error(found: Result, truth: Result) -> tuple[float, str]:
    """The largest relative error over log-probs and every parameter's gradient, and where it is."""
    assert found.grads.keys() == truth.grads.keys()
    errors = {name: relative_error(found.grads[name], truth.grads[name]) for name in truth.grads}
    errors["token_logps"] = relative_error(found.token_logps, truth.token_logps)
    where = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return errors[where], where


def assert_same(found: Result, truth: Result, tolerance: float) -> None:
    """Every log-prob and every parameter's gradient agree to `tolerance`, relative to its norm."""
    error, where = worst_error(found, truth)
    assert error <= tolerance, f"{where} is off by {error:.2e}, allowed {tolerance:.0e}"
