"""Mixers in a pass: no leak between groups, states through every way of running, and clear refusals."""

from __future__ import annotations

import pickle
from typing import Any

import oracle
import pytest
import torch
from hybrid_groups import hybrid_groups
from sample_groups import tokens
from tiny_hybrids import tiny_hybrid

import kvpref
from kvpref import Group, Sequence, UnsupportedModelError
from kvpref.models.mixers import forwards
from kvpref.models.mixers.kinds import GATED_DELTA, MAMBA_2, SHORT_CONVOLUTION


def _batch(groups: list[Group]) -> kvpref.Batch:
    return kvpref.collate(groups, min_shared_tokens=1)


@pytest.mark.parametrize("mode", ["two_pass", "one_pass", "packed"])
@pytest.mark.parametrize("name", ["Qwen3_5Text", "FalconMamba"])
def test_groups_do_not_leak(name: str, mode: str) -> None:
    model = kvpref.attach(tiny_hybrid(name))
    groups = hybrid_groups()[2:]
    changed = [
        Group([Sequence.from_prompt_and_response(tokens(7, 900), tokens(n, 901 + n)) for n in (3, 9)]),
        groups[1],
    ]
    num_own = sum(sum(sequence.scored) for sequence in groups[1].sequences)
    with torch.no_grad():
        before, after = (
            kvpref.response_logps(model, _batch(item), mode=mode).token_logps for item in (groups, changed)
        )
    assert torch.equal(before[-num_own:], after[-num_own:])
    assert not torch.equal(before[:-num_own], after[:-num_own])


def test_layers_in_layers_are_checkpointed_once() -> None:
    """Zamba's hybrid layers hold checkpointed layers."""
    model = tiny_hybrid("Zamba2", torch.float64)
    truth = oracle.naive(oracle.twin(model), hybrid_groups()[2:])
    own, users = kvpref.attach(oracle.twin(model)), kvpref.attach(oracle.twin(model))
    batch = _batch(hybrid_groups()[2:])
    oracle.assert_same(oracle.scheduled(own, batch, checkpoint="all"), truth, 1e-10)
    oracle.checkpoint_layers(users)
    oracle.assert_same(oracle.scheduled(users, batch), truth, 1e-10)


def test_encoding_and_scoring_apart() -> None:
    model = tiny_hybrid("Qwen3_5Text", torch.float64)
    truth = oracle.naive(oracle.twin(model), hybrid_groups())
    kvpref.attach(model)
    batch = _batch(hybrid_groups())
    with oracle.precision(model):
        cache = kvpref.encode_prefix(model, batch)
        held = sum(t.nbytes for layer in cache.layers for slab in layer.slabs for t in slab)
        assert cache.num_bytes > held  # and states
        for _ in range(2):  # scoring does not change the cache
            logps = kvpref.score_responses(model, batch, cache).token_logps
            assert oracle.relative_error(logps, truth.token_logps) < 1e-10


@pytest.mark.parametrize("name", ["Qwen3_5Text", "Mamba2"])
@pytest.mark.parametrize("max_tokens", [None, 3])
def test_prompts_without_gradient(name: str, max_tokens: int | None) -> None:
    """As if keys, values and states of prompts were constants."""
    model = kvpref.attach(tiny_hybrid(name, torch.float64))
    groups = [
        Group([Sequence.from_prompt_and_response(tokens(7, 1), [3 + n, *tokens(n, 2 + n)]) for n in (4, 2, 5)]),
        Group([Sequence.from_prompt_and_response(tokens(4, 9), [3 + n, *tokens(n, 12 + n)]) for n in (1, 6)]),
    ]
    batch = _batch(groups)
    with oracle.precision(model):
        with torch.no_grad():
            cache = kvpref.encode_prefix(model, batch)
        # The rows that predict first tokens are prompts' too, so they are constants in both.
        logps = kvpref.score_responses(model, batch, cache).token_logps
        (logps * oracle.loss_weights(groups).to(logps)).sum().backward()
    truth = oracle.Result(logps.detach(), oracle.grads_of(model))
    options = {"schedule": "bounded", "max_tokens_per_chunk": max_tokens, "prefix_grad": False, "prefix_cache": "cpu"}
    found = oracle.scheduled(model, batch, **options)
    head = [parameter for parameter in truth.grads if "lm_head" in parameter or "embed" in parameter]
    for grads in (found.grads, truth.grads):
        for parameter in head:  # of which these rows have a share
            del grads[parameter]
    oracle.assert_same(found, truth, 1e-10)


def test_ordinary_forwards_and_a_second_attach() -> None:
    model = tiny_hybrid("Mamba2")  # whose attention does not change
    ids = torch.tensor([tokens(9, 1)])
    before = model(input_ids=ids, use_cache=False).logits
    kvpref.attach(kvpref.attach(model))
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 12)
    forwards.attach_mixers(model)


def test_a_pickled_model_is_attached_again() -> None:
    model = tiny_hybrid("Lfm2", torch.float64)
    truth = oracle.naive(oracle.twin(model), hybrid_groups())
    kvpref.attach(model)
    model.__dict__.pop("forward")  # which holds what does not travel
    again = kvpref.attach(pickle.loads(pickle.dumps(model)))
    oracle.assert_same(oracle.shared(again, _batch(hybrid_groups())), truth, 1e-10)


def test_a_replaced_forward_is_refused() -> None:
    model = tiny_hybrid("Lfm2")
    mixer = model.model.layers[0].conv
    mixer.forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(UnsupportedModelError, match=r"model.layers.0.conv \(Lfm2ShortConv\) was replaced"):
        kvpref.attach(model)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(MAMBA_2, "without mamba2_chunk_scan"), (SHORT_CONVOLUTION, "with torch_chunk_gated_delta_rule")],
)
def test_a_mixer_that_computes_otherwise_is_refused(kind: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later release, say."""
    monkeypatch.setattr(forwards, "KINDS", {"Qwen3_5GatedDeltaNet": kind})
    with pytest.raises(UnsupportedModelError, match=message):
        kvpref.attach(tiny_hybrid("Qwen3_5Text"))


def test_an_unknown_mixer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would mix tokens of different sequences."""
    monkeypatch.setattr(forwards, "KINDS", {"Other": GATED_DELTA})
    model = kvpref.attach(tiny_hybrid("Qwen3_5Text"))
    with pytest.raises(UnsupportedModelError, match=r"model.layers.0 .* mixes tokens in a way kvpref does not follow"):
        kvpref.response_logps(model, _batch(hybrid_groups()))


def test_a_mixer_that_runs_twice_is_refused() -> None:
    model = tiny_hybrid("Qwen3_5Text")
    model.model.layers[2] = model.model.layers[0]
    kvpref.attach(model)
    with pytest.raises(UnsupportedModelError, match="runs more than once"):
        kvpref.response_logps(model, _batch(hybrid_groups()))


@pytest.mark.parametrize("attached", [True, False])
def test_padded_batches_share_prefixes(attached: bool) -> None:
    model = tiny_hybrid("Qwen3_5Text", torch.float64)
    reference = oracle.twin(model)
    if attached:
        kvpref.attach(model)
    prompt = tokens(60, 1)
    ids = torch.tensor([prompt + tokens(30, seed) for seed in range(4)])
    with oracle.true_float64():
        truth = reference(input_ids=ids, use_cache=False).logits
        with kvpref.shared_prefix(model) as sharing:
            found = model(input_ids=ids, use_cache=False).logits
    assert oracle.relative_error(found, truth) < 1e-10
    assert sharing.stats.num_served == 1
