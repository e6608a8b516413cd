"""One micro-batch through one of TRL's losses and one of kvpref's: two tiny models, the loss, every gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import tiny_model
from torch import nn

import kvpref
from kvpref.losses import PreferenceLoss

# float32 losses; relative where they are larger than one
LOSS_TOLERANCE = 1e-6
# float32 gradients relative to the largest, summed in another order: 3.4e-6 measured
GRADIENT_TOLERANCE = 1e-5
# DiscoPOP multiplies differences of log-ratios by 1 / tau = 20, and with them their rounding. Measured against float64,
# depending on the processor: TRL's up to 2.3e-5, kvpref's 6e-6.
STEEP_GRADIENT_TOLERANCE = 5e-5
# float32 log-probs of some tens of nats
METRIC_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Result:
    """What a loss gave on a model."""

    loss: float
    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]


def policy_model() -> nn.Module:
    """A tiny random model, the same every time."""
    return tiny_model("llama")


def reference_model() -> nn.Module:
    """The policy with other weights: log-ratios of some tenths to some nats."""
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def run_kvpref(loss: PreferenceLoss, batch: kvpref.Batch, policy: nn.Module, reference: nn.Module) -> Result:
    """The loss from the engine's log-probs, and its gradient."""
    kvpref.attach(policy)
    with torch.no_grad():
        reference_logps = kvpref.response_logps(kvpref.attach(reference), batch)
    output = loss(kvpref.response_logps(policy, batch, head=loss.head), reference_logps, batch)
    output.loss.backward()
    metrics = {name: value.item() for name, value in output.metrics.items()}
    return Result(output.loss.item(), metrics, _gradients(policy))


def run_trl(loss: torch.Tensor, metrics: dict[str, Any], model: nn.Module, *, differentiates: bool = True) -> Result:
    """What TRL computed on its trainer's model; the last entry of metrics that are lists."""
    model.zero_grad()
    if differentiates:
        loss.backward()
    numbers = {name: values[-1] if isinstance(values, list) else values for name, values in metrics.items()}
    return Result(loss.item(), numbers, _gradients(model))


def assert_same(
    found: Result, truth: Result, metrics: tuple[str, ...], gradient_tolerance: float = GRADIENT_TOLERANCE
) -> None:
    """The loss, the named metrics and, where TRL has them, the gradients of all parameters."""
    assert abs(found.loss - truth.loss) <= LOSS_TOLERANCE * max(1.0, abs(truth.loss))
    for name in metrics:
        difference = abs(found.metrics[name] - truth.metrics[name])
        assert difference <= METRIC_TOLERANCE * max(1.0, abs(truth.metrics[name])), name
    if not truth.gradients:
        return
    assert truth.gradients.keys() == found.gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in truth.gradients.values())
    assert largest > 1e-6
    for name, gradient in truth.gradients.items():
        assert (found.gradients[name] - gradient).abs().max().item() <= gradient_tolerance * largest, name


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
