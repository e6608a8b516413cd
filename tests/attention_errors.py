"""How far attention in a low precision is from float64, beside what naive attention in that precision makes.

No pytest here: the GPU run uses it where pytest is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from dense_attention import Inputs

from kvpref.ops.attention import CascadePlan
from kvpref.records.tensor_fields import tensors_to

Attention = Callable[[Inputs], torch.Tensor]


class Errors(NamedTuple):
    """Relative errors on norms, of the output or one gradient."""

    name: str
    found: float
    naive: float
    slack: float

    @property
    def is_fine(self) -> bool:
        """No worse than twice the naive error; NaN is not."""
        return self.found <= 2 * self.naive + self.slack


def tolerance_of(dtype: torch.dtype) -> float:
    """On norms, in 16 bits: probabilities and results are rounded, a few units in the last place.

    In fp32 on tensor cores: three products of TF32 halves (2^-21) instead of one of fp32 (2^-24), summed over hundreds
    of terms.
    """
    return 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over norm of the truth. Where the truth is zero any finite numbers will do."""
    error, size = (found.double().cpu() - truth.double().cpu()).norm(), truth.double().norm().cpu()
    return float(error / size) if size > 0 else 0.0 * float(error)


def errors_beside_naive(found: Attention, naive: Attention, inputs: Inputs, truth_device: str) -> list[Errors]:
    """Of the output and every gradient.

    Args:
        found: What is judged.
        naive: Dense attention: in float64 it is the truth, in the inputs' dtype it sets the scale.
        inputs: Leaves in the dtype that is judged.
        truth_device: Where `naive` runs.
    """
    dout = normal_like(inputs.query)
    return errors_of_results(differentiated(found, inputs, dout), naive, inputs, dout, truth_device)


def errors_of_results(
    found: Sequence[torch.Tensor], naive: Attention, inputs: Inputs, dout: torch.Tensor, truth_device: str
) -> list[Errors]:
    """The same, of results that are there already: the output, then the gradient of every leaf."""
    dtype = inputs.query.dtype
    truth = differentiated(naive, leaves_to(inputs, truth_device, torch.float64), dout)
    scale = differentiated(naive, leaves_to(inputs, truth_device, dtype), dout)
    slack = tolerance_of(dtype) if dtype == torch.float32 else torch.finfo(dtype).eps
    names = ["out", "dq", "dk", "dv"]
    names += [f"{name} of prefix {index}" for index in range(len(inputs.prefixes)) for name in ("dk", "dv")]
    return [
        Errors(name, relative(own, exact), relative(other, exact), slack)
        for name, own, other, exact in zip(names, found, scale, truth, strict=True)
    ]


def normal_like(tensor: torch.Tensor) -> torch.Tensor:
    """Normal numbers in its shape, dtype and place; the same on every device."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return noise.to(tensor.device, tensor.dtype)


def differentiated(function: Attention, inputs: Inputs, dout: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradient of every leaf."""
    out = function(inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs.leaves(), dout.to(out.device, out.dtype))]


def plan_to(plan: CascadePlan, device: str) -> CascadePlan:
    """The plan with its offsets on a device."""
    return CascadePlan(
        blocks=tuple(tensors_to(block, device) for block in plan.blocks),
        params=plan.params,
        backend=plan.backend,
    )


def leaves_to(inputs: Inputs, device: str, dtype: torch.dtype) -> Inputs:
    """Leaves of their own, with the strides that they had."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device, dtype).requires_grad_()

    prefixes = [(moved(key), moved(value)) for key, value in inputs.prefixes]
    return Inputs(moved(inputs.query), moved(inputs.key), moved(inputs.value), prefixes)
