"""Any loss in the bounded schedule: responses coupled in any way, some of them ignored, NaN, adapters, refusals."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from sample_groups import five_levels, pairs, tokens
from tiny_models import tiny_model
from torch import nn

import kvpref
from kvpref import Batch, Group, LossOutput, ResponseLogps, Sequence

# Only the order of additions differs; see test_exactness.
FP64_TOLERANCE = 1e-10
BOUNDED: dict[str, Any] = {"schedule": "bounded", "max_tokens_per_chunk": 5}

Loss = Callable[[ResponseLogps, ResponseLogps | None, Batch], LossOutput]


def preferences() -> list[Group]:
    """Three pairs with labels and scores; two share their prompt."""
    prompts = [tokens(6, 1), tokens(9, 2), tokens(6, 1)]
    groups = []
    for index, prompt in enumerate(prompts):
        responses = [[3 + 2 * index + i, *tokens(2 + 3 * i, 10 * index + i)] for i in range(2)]
        sequences = [Sequence.from_prompt_and_response(prompt, response) for response in responses]
        groups.append(Group(sequences, labels=[index == 1, index != 1], scores=[float(index == 1), 0.5]))
    return groups


def coupled(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
    """A softmax over all responses of the batch, weighted with the means of their groups."""
    sums = policy.sum()
    groups = torch.zeros(batch.num_groups, dtype=sums.dtype).index_add(0, policy.group_index, policy.mean())
    shares = (0.1 * sums).softmax(0)
    return LossOutput((shares * sums.sigmoid()).sum() + (shares * groups.tanh()[policy.group_index]).sum(), {})


def one_response_only(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
    return LossOutput(policy.sum()[1].square(), {})


def last_token_of_each(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
    return LossOutput(policy.token_logps[policy.cu_seqlens[1:] - 1].exp().sum(), {})


def against_reference(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
    assert reference is not None
    return LossOutput((policy.token_logps - reference.token_logps).square().mean(), {})


OWN: dict[str, Loss] = {
    loss.__name__: loss for loss in (coupled, one_response_only, last_token_of_each, against_reference)
}


@functools.cache
def model() -> nn.Module:
    return kvpref.attach(tiny_model("llama", torch.float64))


def made_reference(batch: Batch) -> ResponseLogps:
    logps = -torch.rand(batch.num_scored_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 9
    return ResponseLogps(token_logps=logps, cu_seqlens=batch.cu_seqlens, group_index=batch.group_index)


def run(loss: Loss, batch: Batch, **options: Any) -> tuple[LossOutput, oracle.Result]:
    outputs: list[LossOutput] = []

    def keeping(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        outputs.append(loss(policy, reference, batch))
        return outputs[-1]

    result = oracle.scheduled(model(), batch, keeping, reference=made_reference(batch), **options)
    return outputs[0], result


@pytest.mark.parametrize("loss", OWN.values(), ids=OWN)
def test_losses_equal_full(loss: Loss) -> None:
    batch = kvpref.collate(preferences(), min_shared_tokens=1)
    (output, found), (expected, truth) = run(loss, batch, **BOUNDED), run(loss, batch)
    oracle.assert_same(found, truth, FP64_TOLERANCE)
    assert max(grad.abs().max() for grad in truth.grads.values()) > 1e-6
    assert torch.allclose(output.loss, expected.loss, rtol=FP64_TOLERANCE, atol=0)
    assert output.metrics.keys() == expected.metrics.keys()
    for key, value in expected.metrics.items():
        assert torch.allclose(output.metrics[key], value, rtol=FP64_TOLERANCE, atol=0), key


def test_the_output_has_no_graph() -> None:
    batch = kvpref.collate(preferences(), min_shared_tokens=1)
    assert not kvpref.forward_backward(model(), batch, coupled, **BOUNDED).loss.requires_grad


def nan_for_one_token(token: int) -> tuple[nn.Module, list[Group]]:
    """A model that makes NaN of a token, which stands in the last response of `pairs` only."""
    broken = kvpref.attach(tiny_model("llama", torch.float64, tie_word_embeddings=False))
    with torch.no_grad():
        broken.get_input_embeddings().weight[token] = torch.nan
    groups = [
        Group([Sequence([t - (t == token) for t in s.input_ids], s.scored) for s in group.sequences])
        for group in pairs()
    ]
    last = groups[-1].sequences[-1]
    spoiled = Sequence([*last.input_ids[:4], token, *last.input_ids[5:]], last.scored)
    return broken, [*groups[:-1], Group([*groups[-1].sequences[:-1], spoiled])]


def test_nan_in_one_response_is_the_nan_of_full() -> None:
    broken, groups = nan_for_one_token(77)
    batch = kvpref.collate(groups, min_shared_tokens=1)
    results = [oracle.scheduled(broken, batch, **options) for options in ({}, BOUNDED)]
    losses = [kvpref.forward_backward(broken, batch, oracle.weighted_loss, **options).loss for options in ({}, BOUNDED)]
    assert all(loss.isnan() for loss in losses)
    # Neighbours in the same chunks stay clean: NaN is where it belongs, and nowhere else.
    assert torch.equal(results[0].token_logps.isnan(), results[1].token_logps.isnan())
    assert results[1].token_logps.isnan().any()
    assert not results[1].token_logps[: -len(groups[-1].sequences[-1])].isnan().any()
    for name, grad in results[0].grads.items():
        assert torch.equal(grad.isnan(), results[1].grads[name].isnan()), name


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda policy, *_: LossOutput(policy.sum().mean().detach(), {}), "a loss without gradient"),
        (lambda policy, *_: LossOutput(policy.sum(), {}), "a scalar tensor"),
        (lambda policy, *_: "a loss", "a kvpref.LossOutput"),
    ],
)
@pytest.mark.parametrize("options", [BOUNDED, {"prefix_grad": False}], ids=["bounded", "constant prompts"])
def test_wrong_losses_are_refused(options: dict[str, Any], loss: Loss, message: str) -> None:
    with pytest.raises(kvpref.InputError, match=message):
        kvpref.forward_backward(model(), kvpref.collate(pairs()), loss, **options)


def test_without_gradients_there_is_nothing_to_do() -> None:
    with torch.no_grad(), pytest.raises(kvpref.InputError, match="a loss without gradient"):
        kvpref.forward_backward(model(), kvpref.collate(pairs()), coupled, **BOUNDED)


def wrap(inner: nn.Module, **options: Any) -> nn.Module:
    """LoRA with random adapters, the same for every call."""
    peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")
    config = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 3, "init_lora_weights": False, **options}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(inner, peft.LoraConfig(task_type="CAUSAL_LM", **config)).to(torch.float64)


ADAPTERS: dict[str, dict[str, Any]] = {
    "several": {},
    "queries only": {"target_modules": ["q_proj"]},
    "last layer only": {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
    "and head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("checkpoint", ["none", "all"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(adapter: str, checkpoint: str) -> None:
    truth = oracle.naive(wrap(tiny_model("llama", torch.float64), **ADAPTERS[adapter]), five_levels())
    attached = kvpref.attach(wrap(tiny_model("llama", torch.float64), **ADAPTERS[adapter]))
    batch = kvpref.collate(five_levels(), min_shared_tokens=1)
    oracle.assert_same(oracle.scheduled(attached, batch, checkpoint=checkpoint, **BOUNDED), truth, FP64_TOLERANCE)
    assert all(p.grad is None for p in attached.parameters() if not p.requires_grad)


@pytest.mark.parametrize("trained", ["lm_head", "norm", "embed_tokens", "layers.1.mlp"])
def test_mostly_frozen_models(trained: str) -> None:
    """Chunks whose keys and values need no gradient, or whose log-probs alone do."""

    def frozen() -> nn.Module:
        made = tiny_model("llama", torch.float64)
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(trained in name)
        return made

    truth = oracle.naive(frozen(), five_levels())
    assert truth.grads
    batch = kvpref.collate(five_levels(), min_shared_tokens=1)
    found = oracle.scheduled(kvpref.attach(frozen()), batch, **BOUNDED)
    oracle.assert_same(found, truth, FP64_TOLERANCE)
