"""Entropy and collision of the fused head against the full distribution, at tile edges and where columns are masked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvpref.ops.logprob.statistics import HeadParams, token_statistics

TILE = 256
BOTH = HeadParams(logit_scale=0.7, max_tile_bytes=1, entropy=True, collision=True, mean_logits=True)
CAPPED = replace(BOTH, softcap=1.5, temperature=0.6)


def make_case(num_tokens: int, vocab_size: int, *, masked: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(num_tokens, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab_size, 8, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
    if masked:
        bias[: vocab_size // 2] = float("-inf")
    targets = torch.randint(vocab_size // 2, vocab_size, (num_tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), bias, targets


def definition(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    targets: torch.Tensor,
    params: HeadParams = BOTH,
) -> tuple[torch.Tensor, ...]:
    logits = (hidden @ weight.T + bias) * params.logit_scale
    if params.softcap is not None:
        logits = params.softcap * torch.tanh(logits / params.softcap)
    logits = logits / params.temperature
    logps = logits.log_softmax(-1)
    probs = logps.exp()
    entropy = -torch.where(probs > 0, probs * logps.clamp(min=-1e9), 0.0).sum(-1)
    chosen = logps.gather(1, targets.unsqueeze(1)).squeeze(1)
    return chosen, entropy, probs.square().sum(-1).log(), logits.mean(-1)


# float64 sums of some hundred terms, in two orders
@pytest.mark.parametrize(("masked", "params"), [(False, BOTH), (True, BOTH), (False, CAPPED)])
@pytest.mark.parametrize("vocab_size", [2, TILE - 1, TILE, TILE + 1, 3 * TILE + 5])
def test_fp64_against_the_definition(vocab_size: int, masked: bool, params: HeadParams) -> None:
    hidden, weight, bias, targets = make_case(7, vocab_size, masked=masked)
    found = token_statistics(hidden, weight, targets, bias=bias, params=params)
    truth = definition(hidden, weight, bias, targets, params)
    assert [each is not None and each.requires_grad for each in found] == [True, True, False, False]
    for one, other in zip(found, truth, strict=True):
        assert one is not None
        if not other.isfinite().all():  # the mean of logits of which some are -inf
            assert torch.equal(one, other)
            continue
        assert (one - other).abs().max() <= 1e-12 * other.abs().max().clamp(min=1)
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    for pick in ([0], [1], [0, 1]):
        grads = [
            torch.autograd.grad(
                sum((outputs[i] * (i + weights)).sum() for i in pick), (hidden, weight), retain_graph=True
            )
            for outputs in (found, truth)
        ]
        for one, other in zip(*grads, strict=True):
            assert (one - other).norm() <= 1e-12 * other.norm().clamp(min=1)


def test_bias_gets_the_entropys_gradient() -> None:
    hidden, weight, bias, targets = make_case(5, TILE + 3, masked=False)
    bias.requires_grad_()
    entropy = token_statistics(hidden, weight, targets, bias=bias, params=BOTH).entropy
    assert entropy is not None
    (found,) = torch.autograd.grad(entropy.sum(), bias)
    (truth,) = torch.autograd.grad(definition(hidden, weight, bias, targets)[1].sum(), bias)
    assert (found - truth).norm() <= 1e-12 * truth.norm()


def test_without_tokens() -> None:
    hidden, weight, bias, targets = make_case(3, TILE + 3, masked=False)
    found = token_statistics(hidden[:0], weight, targets[:0], bias=bias, params=BOTH)
    assert [item.shape[0] for item in found if item is not None] == [0, 0, 0, 0]


def test_what_is_not_asked_for_is_not_there() -> None:
    hidden, weight, bias, targets = make_case(3, 5, masked=False)
    found = token_statistics(hidden, weight, targets, bias=bias)
    assert found.entropy is None
    assert found.collision is None
    assert found.mean_logits is None
