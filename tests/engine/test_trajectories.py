"""Random trees of trajectories in every mode and schedule, against each sequence alone, with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import oracle
import pytest
import torch
from random_trajectories import KINDS, groups_of, trajectories
from tiny_hybrids import tiny_hybrid
from tiny_models import tiny_model
from torch import nn
from transformers import PreTrainedModel

import kvpref
from kvpref import Batch, Group, LossOutput, ResponseLogps, Sequence
from kvpref.engine.options import EngineOptions
from kvpref.engine.schedules import forward_backward_step
from kvpref.plan.step import join_batches

TOLERANCE = 1e-10  # float64 sums in another order; 1e-12 measured
WAYS: tuple[dict[str, Any], ...] = (
    {"mode": "two_pass"},
    {"mode": "one_pass", "checkpoint": "all"},
    {"mode": "two_pass", "checkpoint": "prefix"},
    {"mode": "packed"},
    {"schedule": "bounded", "max_tokens_per_chunk": 3, "checkpoint": "all"},
    {"schedule": "bounded", "max_tokens_per_chunk": 50},
)
FULL = pytest.mark.full


@cache
def models(name: str) -> tuple[nn.Module, PreTrainedModel]:
    """Attached, and as it was."""
    model = MODELS[name]()
    plain = oracle.twin(model)
    return kvpref.attach(model), plain


MODELS = {
    "llama": partial(tiny_model, "llama", torch.float64),
    "gpt2": partial(tiny_model, "gpt2", torch.float64),
    "Qwen3Next": partial(tiny_hybrid, "Qwen3Next", torch.float64),
    "Lfm2": partial(tiny_hybrid, "Lfm2", torch.float64),
}


def weights_of(groups: list[Group]) -> torch.Tensor:
    """One number per scored token, with what the responses weigh."""
    own = [weight for group in groups for part in group.parts for weight in part.weights or [1.0] * part.num_scored]
    return oracle.loss_weights(groups) * torch.tensor(own, dtype=torch.float64)


def loss(policy: ResponseLogps, reference: None, batch: Batch) -> LossOutput:
    weights = oracle.loss_weights(list(batch.groups))
    own = 1.0 if policy.weights is None else policy.weights
    return LossOutput((policy.token_logps * weights * own).sum(), {})


def alone(model: PreTrainedModel, batches: list[list[Group]]) -> oracle.Result:
    model.zero_grad(set_to_none=True)
    with oracle.precision(model):
        found = [oracle.naive_token_logps(model, groups) for groups in batches]
        sums = [(logps * weights_of(groups)).sum() for logps, groups in zip(found, batches, strict=True)]
        torch.stack(sums).sum().backward()
    return oracle.Result(torch.cat(found).detach(), oracle.grads_of(model))


def assert_same(found: oracle.Result, truth: oracle.Result, what: object) -> None:
    """As `oracle.assert_same`, but a gradient counts by its part of all: few tokens leave some that are rounding."""
    size = torch.stack([grad.norm() for grad in truth.grads.values()]).norm()
    errors = {name: (found.grads[name] - grad).norm() / size for name, grad in truth.grads.items()}
    errors["token_logps"] = (found.token_logps - truth.token_logps).norm() / truth.token_logps.norm()
    assert all(error < TOLERANCE for error in errors.values()), (what, max(errors, key=lambda name: errors[name]))


@pytest.mark.parametrize(
    ("kind", "name", "seed"),
    [
        ("comb", "llama", 0),
        ("tree", "Qwen3Next", 0),
        *(
            pytest.param(kind, name, seed, marks=FULL)
            for kind in KINDS
            for name in MODELS
            for seed in range(2)
            if (kind, name, seed) not in (("comb", "llama", 0), ("tree", "Qwen3Next", 0), ("comb", "Qwen3Next", 1))
        ),
    ],
)
def test_every_way_is_exact(kind: str, name: str, seed: int) -> None:
    model, plain = models(name)
    groups = groups_of(trajectories(kind, seed), seed)
    truth = alone(plain, [groups])
    for way in WAYS:
        found = oracle.scheduled(model, kvpref.collate(groups, min_shared_tokens=1), loss, **way)
        assert_same(found, truth, way)


def run_step(model: nn.Module, batches: list[list[Group]], options: EngineOptions) -> oracle.Result:
    seen: list[torch.Tensor] = []

    def spying(policy: ResponseLogps, reference: None, batch: Batch) -> LossOutput:
        seen.append(policy.token_logps.detach())
        return loss(policy, reference, batch)

    collated = [kvpref.collate(groups, min_shared_tokens=1) for groups in batches]
    step = join_batches(collated, max_tokens_per_chunk=options.max_tokens_per_chunk, prefix_grad=options.prefix_grad)
    model.zero_grad(set_to_none=True)
    with oracle.precision(model):
        forward_backward_step(
            model, step, spying, options, references=[None] * len(batches), backward=lambda total, _: total.backward()
        )
    return oracle.Result(torch.cat(seen), oracle.grads_of(model))


@pytest.mark.parametrize(
    ("kind", "max_tokens"),
    [("tree", 5), *(pytest.param(kind, size, marks=FULL) for kind in KINDS for size in (1, 20))],
)
def test_micro_batches_that_share_their_trajectories(kind: str, max_tokens: int) -> None:
    """Each trajectory may stand in either of them, or end in one where the other goes on."""
    model, plain = models("llama")
    batches = [[group] for group in groups_of(trajectories(kind, 1), 1)]
    options = EngineOptions(schedule="bounded", max_tokens_per_chunk=max_tokens, prefix_cache="cpu")
    assert_same(run_step(model, batches, options), alone(plain, batches), max_tokens)


@contextmanager
def constant_rows(model: Any, rows: list[bool]) -> Iterator[None]:
    """What the model makes of these rows has no gradient."""
    mask = torch.tensor(rows)[None, :, None]

    def cut(module: nn.Module, args: Any, made: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, made.detach(), made)

    attention = [linear for layer in model.model.layers for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    modules = (model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head, *attention)
    hooks = [module.register_forward_hook(cut) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def prompt_rows(sequence: Sequence, sequences: list[Sequence]) -> list[bool]:
    """Tokens that no sequence scores which holds them, nor one before."""
    ids = sequence.input_ids
    starts = [ids[: place + 1] for place in range(len(ids))]
    return [
        not any(any(other.scored[: len(start)]) for other in sequences if other.input_ids[: len(start)] == start)
        for start in starts
    ]


@pytest.mark.parametrize(
    ("kind", "max_tokens"), [("chain", 4), *(pytest.param(kind, size, marks=FULL) for kind in KINDS for size in (1, 9))]
)
def test_constant_prompts_are_those_that_no_holder_scores(kind: str, max_tokens: int) -> None:
    model, plain = models("llama")
    batches = [[group] for group in groups_of(trajectories(kind, 2), 2)]
    parts = [part for groups in batches for group in groups for part in group.parts]
    plain.zero_grad(set_to_none=True)
    logps = []
    with oracle.precision(plain):
        for groups in batches:
            for part in (part for group in groups for part in group.parts):
                with constant_rows(plain, prompt_rows(part, parts)):
                    logps.append(oracle.naive_token_logps(plain, [Group([Sequence(part.ids, part.flags)])]))
        sums = torch.cat(logps) * torch.cat([weights_of(groups) for groups in batches])
        sums.sum().backward()
    truth = oracle.Result(torch.cat(logps).detach(), oracle.grads_of(plain))
    options = EngineOptions(schedule="bounded", max_tokens_per_chunk=max_tokens, prefix_grad=False)
    assert_same(run_step(model, batches, options), truth, max_tokens)
