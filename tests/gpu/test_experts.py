"""Experts on CUDA beside float64 on the CPU: grouped products, and the load-balancing loss."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from sample_groups import five_levels, pairs
from tiny_experts import known_families, tiny_experts

import kvpref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
COEFFICIENT = 0.5


def run(model: torch.nn.Module, device: str, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    batch = kvpref.collate(five_levels() + pairs(), min_shared_tokens=1, device=device)
    with oracle.precision(model):
        output = kvpref.forward_backward(
            model, batch, oracle.weighted_loss, router_aux_loss_coef=COEFFICIENT, **options
        )
    return float(output.metrics["router_aux_loss"]), oracle.grads_of(model)


@pytest.mark.parametrize("options", [{}, {"schedule": "bounded", "max_tokens_per_chunk": 5}], ids=["full", "bounded"])
def test_the_load_balancing_loss(options: dict[str, Any]) -> None:
    with known_families():
        exact, model = kvpref.attach(tiny_experts("qwen3_moe")), tiny_experts("qwen3_moe", torch.float32)
        kvpref.attach(model.to("cuda"))
    loss, grads = run(exact, "cpu")
    found_loss, found = run(model, "cuda", **options)
    # float32: some hundred additions in another order, TF32 off by default
    assert found_loss == pytest.approx(loss, rel=1e-4)
    for name, grad in grads.items():
        if grad.norm() > 1e-3:  # some vanish but for rounding
            assert oracle.relative_error(found[name].cpu(), grad) <= 1e-3, name
