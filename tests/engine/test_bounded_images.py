"""Images in the bounded schedule: exact whatever the chunks, tower and projector included, each image run once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from torch import nn
from vision_models import (
    VisionGroups,
    VisionPrompt,
    naive_vision_run,
    picture,
    tiny_vision_model,
    vision_groups,
)

import kvpref
from kvpref.engine import bounded as engine_bounded
from kvpref.engine.options import EngineOptions
from kvpref.engine.schedules import forward_backward_step, score
from kvpref.losses import make_loss
from kvpref.models.backbone import backbone
from kvpref.models.classes import model_class
from kvpref.plan.batch import Batch

# Only the order of additions differs. Measured: 1e-14.
TOLERANCE = 1e-10
NAME = "qwen2_5_vl"
NUM_IMAGES = 3


@functools.cache
def groups_of(name: str) -> VisionGroups:
    return vision_groups(name)


@functools.cache
def truth(name: str) -> oracle.Result:
    return seen_by_softmax(naive_vision_run(tiny_vision_model(name, torch.float64), groups_of(name)))


def seen_by_softmax(result: oracle.Result) -> oracle.Result:
    """Without biases of keys, which softmax does not see: their gradients are rounding alone."""
    hidden = [name for name in result.grads if name.endswith("k_proj.bias") and "vision" in name]
    assert all(result.grads.pop(name).norm() < 1e-10 for name in hidden)
    return result


@functools.cache
def attached(name: str) -> nn.Module:
    return kvpref.attach(tiny_vision_model(name, torch.float64))


def batch_of(name: str) -> Batch:
    return kvpref.collate(groups_of(name).groups, min_shared_tokens=1)


def bounded(name: str, max_tokens: int | None, **options: Any) -> oracle.Result:
    found = oracle.scheduled(
        attached(name), batch_of(name), schedule="bounded", max_tokens_per_chunk=max_tokens, **options
    )
    return seen_by_softmax(found)


@pytest.mark.parametrize("max_tokens", [None, 24, 5])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_gradients_are_those_of_each_sequence_alone(name: str, max_tokens: int | None) -> None:
    oracle.assert_same(bounded(name, max_tokens), truth(name), TOLERANCE)


@pytest.mark.parametrize("checkpoint", ["prefix", "all"])
def test_towers_are_checkpointed_with_the_prompts(checkpoint: str) -> None:
    with tower_calls(attached(NAME)) as calls:
        oracle.assert_same(bounded(NAME, 24, checkpoint=checkpoint), truth(NAME), TOLERANCE)
    assert sum(calls) == 2 * NUM_IMAGES


@contextmanager
def tower_calls(model: nn.Module) -> Iterator[list[int]]:
    """How many images the tower is given, call after call."""
    calls: list[int] = []

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(len(kwargs["grid_thw"]))

    with backbone(model).visual.register_forward_pre_hook(count, with_kwargs=True):  # type: ignore[arg-type]
        yield calls


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (None, [3]),  # its graph is kept
        (10_000, [3]),
        (60, [3, 3]),  # one chunk of images, but no room for its graph beside a chunk of text
        (8, [1, 1, 1, 1, 1, 1]),  # forward, and again with a graph
    ],
)
def test_the_tower_runs_once_per_image_and_once_more_where_its_graph_is_not_kept(
    max_tokens: int | None, expected: list[int]
) -> None:
    with tower_calls(attached(NAME)) as calls:
        bounded(NAME, max_tokens)
    assert calls == expected


def test_a_frozen_tower_runs_once_and_gets_no_gradient() -> None:
    model = kvpref.attach(tiny_vision_model(NAME, torch.float64))
    tower = backbone(model).visual
    assert isinstance(tower, nn.Module)
    tower.requires_grad_(False)
    with tower_calls(model) as calls:
        found = oracle.scheduled(model, batch_of(NAME), schedule="bounded", max_tokens_per_chunk=8)
    assert calls == [1, 1, 1]
    assert all(parameter.grad is None for parameter in tower.parameters())
    expected = {name: grad for name, grad in truth(NAME).grads.items() if "visual" not in name}
    oracle.assert_same(found, oracle.Result(truth(NAME).token_logps, expected), TOLERANCE)


def test_a_projector_that_trains_alone_gets_its_gradient() -> None:
    model = kvpref.attach(tiny_vision_model(NAME, torch.float64))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("merger" in name)
    found = oracle.scheduled(model, batch_of(NAME), schedule="bounded", max_tokens_per_chunk=8)
    expected = {name: grad for name, grad in truth(NAME).grads.items() if "merger" in name}
    oracle.assert_same(found, oracle.Result(truth(NAME).token_logps, expected), TOLERANCE)


def test_prompts_without_gradient_leave_none_in_the_tower() -> None:
    found = {}
    for max_tokens in (None, 8):
        with tower_calls(attached(NAME)) as calls:
            found[max_tokens] = bounded(NAME, max_tokens, prefix_grad=False)
        assert sum(calls) == NUM_IMAGES
    assert all(grad.norm() == 0 for name, grad in found[8].grads.items() if "visual" in name)
    oracle.assert_same(found[8], found[None], TOLERANCE)


def test_micro_batches_share_the_images_of_their_step() -> None:
    model, groups = attached(NAME), groups_of(NAME).groups
    batches = [kvpref.collate(several, min_shared_tokens=1) for several in (groups[:2], groups[2:3], groups[3:])]
    weights = oracle.loss_weights(groups).split([batch.num_scored_tokens for batch in batches])
    numbers = iter(weights)

    def loss(policy: kvpref.ResponseLogps, reference: Any, batch: Batch) -> kvpref.LossOutput:
        return kvpref.LossOutput((policy.token_logps * next(numbers)).sum(), {})

    options = EngineOptions(schedule="bounded", max_tokens_per_chunk=24)
    step = kvpref.join_batches(batches, max_tokens_per_chunk=24)
    assert len(step.chunks.images) == NUM_IMAGES
    model.zero_grad(set_to_none=True)
    with oracle.precision(model), tower_calls(model) as calls:
        forward_backward_step(
            model, step, loss, options, references=[None] * 3, backward=lambda total, _: total.backward()
        )
    assert sum(calls) == 2 * NUM_IMAGES
    found = oracle.Result(truth(NAME).token_logps, oracle.grads_of(model))
    oracle.assert_same(found, truth(NAME), TOLERANCE)


def test_a_loss_that_couples_responses() -> None:
    def loss(policy: kvpref.ResponseLogps, reference: Any, batch: Batch) -> kvpref.LossOutput:
        return kvpref.LossOutput(policy.mean().softmax(0)[::2].sum(), {})

    full = oracle.scheduled(attached(NAME), batch_of(NAME), loss)
    for max_tokens in (24, 6):
        found = oracle.scheduled(
            attached(NAME), batch_of(NAME), loss, schedule="bounded", max_tokens_per_chunk=max_tokens
        )
        oracle.assert_same(found, full, TOLERANCE)


def test_scores_are_those_of_schedule_full() -> None:
    batch = batch_of(NAME)
    with oracle.precision(attached(NAME)), tower_calls(attached(NAME)) as calls:
        found = score(attached(NAME), batch, EngineOptions(schedule="bounded", max_tokens_per_chunk=8))
    assert calls == [1, 1, 1]
    torch.testing.assert_close(found.token_logps, truth(NAME).token_logps, rtol=0, atol=1e-12)


def test_images_are_read_once_however_many_prompts_show_them() -> None:
    made = vision_groups(NAME)
    reads: list[str] = []

    def read(image: kvpref.Image) -> Any:
        reads.append(image.key)
        return image.read()

    def counted(sequence: kvpref.Sequence) -> kvpref.Sequence:
        images = [
            kvpref.PlacedImage(
                kvpref.Image(image.key, image.token_id, image.num_tokens, functools.partial(read, image)), runs
            )
            for image, runs in sequence.images
        ]
        return kvpref.Sequence(sequence.input_ids, sequence.scored, images)

    groups = [kvpref.Group([counted(sequence) for sequence in group.sequences]) for group in made.groups]
    batch = kvpref.collate(groups, min_shared_tokens=1)
    for _ in range(2):
        kvpref.forward_backward(attached(NAME), batch, oracle.weighted_loss, schedule="bounded", max_tokens_per_chunk=8)
    assert len(reads) == len(set(reads)) == NUM_IMAGES


def test_a_step_without_images_runs_no_tower() -> None:
    batch = kvpref.collate([groups_of(NAME).groups[1]], min_shared_tokens=1)
    with tower_calls(attached(NAME)) as calls:
        oracle.scheduled(attached(NAME), batch, schedule="bounded", max_tokens_per_chunk=8)
    assert not calls


def test_an_image_longer_than_the_bound_is_whole_where_its_tokens_see_one_another() -> None:
    made = vision_groups("gemma3", [VisionPrompt("What is it?", (picture(1),), ("A cat.", "A dog"))])
    expected = seen_by_softmax(naive_vision_run(tiny_vision_model("gemma3", torch.float64), made))
    batch = kvpref.collate(made.groups, min_shared_tokens=1)
    found = oracle.scheduled(attached("gemma3"), batch, schedule="bounded", max_tokens_per_chunk=2)
    oracle.assert_same(seen_by_softmax(found), expected, TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("max_tokens", [1, 3, 7, 13, 200])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_gradients_in_chunks_of_many_sizes(name: str, max_tokens: int) -> None:
    oracle.assert_same(bounded(name, max_tokens), truth(name), TOLERANCE)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_keys_and_values_that_wait_in_host_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_bounded, "moves_to_host", lambda device: True)
    oracle.assert_same(bounded(name, 24, prefix_cache="cpu"), truth(name), TOLERANCE)


@pytest.mark.parametrize("checkpoint", ["none", "all"])
def test_rewards_of_prompts_with_images(checkpoint: str) -> None:
    groups = groups_of(NAME).groups
    ranked = [kvpref.Group(group.sequences, scores=[float(n) for n in range(len(group))]) for group in groups]
    config = tiny_vision_model(NAME).config
    config.num_labels = 1
    torch.manual_seed(3)
    model = kvpref.attach(model_class(config, "ends").from_config(config, dtype=torch.float64).train())
    batch = kvpref.collate(ranked, min_shared_tokens=1)
    found = []
    for options in ({"schedule": "full"}, {"schedule": "bounded", "max_tokens_per_chunk": 8}):
        model.zero_grad(set_to_none=True)
        output = kvpref.forward_backward(model, batch, make_loss("bradley_terry"), checkpoint=checkpoint, **options)
        found.append(oracle.Result(output.loss.unsqueeze(0), oracle.grads_of(model)))
    assert any(grad.norm() > 0 for name, grad in found[0].grads.items() if "visual" in name)
    oracle.assert_same(found[1], found[0], 1e-6)  # norms of model code round to float32
