"""Sums over routers, and how many experts a token goes to, found by asking the model's own loss."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from tiny_experts import known_families, tiny_experts
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import kvpref
from kvpref.models.experts import RouterTally

COUNTS = torch.tensor([[1.0, 3.0, 0.0, 2.0], [0.0, 1.0, 4.0, 1.0]])


@pytest.fixture(autouse=True)
def _known_families() -> Iterator[None]:
    with known_families():
        yield


def logits_of_layers(num_experts: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(COUNTS.shape[1], num_experts, generator=generator).requires_grad_() for _ in range(3))


def test_counts_stand_for_repeated_rows_in_number_and_gradient() -> None:
    layers = logits_of_layers()
    tally = RouterTally(kvpref.attach(tiny_experts("mixtral", torch.float32)), [COUNTS[:, :1], COUNTS[:, 1:]])
    for rows in (slice(0, 1), slice(1, 4)):  # two passes
        tally.add(SimpleNamespace(router_logits=tuple(layer[rows] for layer in layers)))
    found = tally.sums().balance_losses()
    for index, counts in enumerate(COUNTS.int()):
        repeated = tuple(layer.repeat_interleave(counts, dim=0) for layer in layers)
        expected = load_balancing_loss_func(repeated, 5, 3)
        # fp32 sums of some ten rows
        torch.testing.assert_close(found[index], expected, rtol=1e-6, atol=1e-6)
        for one, other in zip(
            torch.autograd.grad(found[index], layers, retain_graph=True),
            torch.autograd.grad(expected, layers, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_number_of_experts_is_the_one_that_the_models_loss_uses(top_k: int) -> None:
    """A config may name others, too."""
    model = tiny_experts("mixtral", torch.float32, num_experts_per_tok=top_k, moe_top_k=3, top_k=2)
    layers = logits_of_layers()
    tally = RouterTally(kvpref.attach(model), [torch.ones(1, COUNTS.shape[1])])
    tally.add(SimpleNamespace(router_logits=layers))
    expected = load_balancing_loss_func(layers, 5, top_k)
    torch.testing.assert_close(tally.sums().balance_losses()[0], expected)
