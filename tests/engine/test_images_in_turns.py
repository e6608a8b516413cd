"""Images in several turns of a conversation, some behind scored tokens, in prefix trees of more than two levels."""

from __future__ import annotations

import functools

import oracle
import pytest
import torch
from torch import nn
from vision_models import tiny_vision_model, vision_groups

import kvpref
from kvpref import Group, PlacedImage, Sequence
from kvpref.models.vision.own_inputs import own_inputs

# Only the order of additions differs. Measured: 1e-14.
TOLERANCE = 1e-10


def conversation(*turns: Sequence) -> Sequence:
    """Turns one after another; the images of later ones stand behind the responses of earlier ones."""
    ids: list[int] = []
    scored: list[bool] = []
    images: list[PlacedImage] = []
    for turn in turns:
        shift = len(ids)
        images += [PlacedImage(image, tuple((a + shift, b + shift) for a, b in runs)) for image, runs in turn.images]
        ids += turn.input_ids
        scored += turn.scored
    return Sequence(ids, scored, images)


def conversations(name: str) -> list[Group]:
    """Which branch before, between and behind images; one image stands in two turns."""
    one, without, two, again = (group.sequences for group in vision_groups(name).groups)
    return [
        Group(
            [
                conversation(one[0], two[0]),
                conversation(one[0], two[1]),
                conversation(one[1], again[0]),
            ]
        ),
        Group([conversation(without[0], one[0], again[1]), conversation(without[0], one[1])]),
        Group([conversation(one[0], without[0]), conversation(one[0], without[1])]),
    ]


def naive(model: nn.Module, groups: list[Group]) -> oracle.Result:
    """Each conversation alone in the model's own forward."""
    logps = []
    with oracle.precision(model):
        for sequence in (sequence for group in groups for sequence in group.sequences):
            inputs = own_inputs(model, sequence)  # type: ignore[arg-type]
            logits = model(**inputs, use_cache=False).logits[0, :-1]
            found = logits.log_softmax(-1).gather(1, inputs["input_ids"][0, 1:, None]).squeeze(1)
            logps.append(found[torch.tensor(sequence.scored[1:])])
        together = torch.cat(logps)
        (together * oracle.loss_weights(groups)).sum().backward()
    return seen_by_softmax(oracle.Result(together.detach(), oracle.grads_of(model)))


def seen_by_softmax(result: oracle.Result) -> oracle.Result:
    """Without biases of keys, whose gradients are rounding alone."""
    hidden = [name for name in result.grads if name.endswith("k_proj.bias") and "vision" in name]
    assert all(result.grads.pop(name).norm() < 1e-10 for name in hidden)
    return result


@functools.cache
def truth(name: str) -> oracle.Result:
    return naive(tiny_vision_model(name, torch.float64), conversations(name))


@functools.cache
def attached(name: str) -> nn.Module:
    return kvpref.attach(tiny_vision_model(name, torch.float64))


def batch_of(name: str) -> kvpref.Batch:
    batch = kvpref.collate(conversations(name), min_shared_tokens=1)
    assert batch.tree.num_levels > 2
    return batch


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("name", "max_tokens"),
    [
        ("qwen2_5_vl", 9),
        ("gemma3", 9),
        *(pytest.param(name, size, marks=FULL) for name in ("qwen2_5_vl", "gemma3", "llava") for size in (None, 40, 4)),
    ],
)
def test_bounded(name: str, max_tokens: int | None) -> None:
    found = oracle.scheduled(attached(name), batch_of(name), schedule="bounded", max_tokens_per_chunk=max_tokens)
    oracle.assert_same(seen_by_softmax(found), truth(name), TOLERANCE)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("qwen2_5_vl", "two_pass"),
        ("gemma3", "one_pass"),
        *(
            pytest.param(name, mode, marks=FULL)
            for name in ("qwen2_5_vl", "gemma3", "llava")
            for mode in ("two_pass", "one_pass", "packed", "padded")
        ),
    ],
)
def test_modes(name: str, mode: str) -> None:
    found = oracle.shared(attached(name), batch_of(name), mode=mode)
    oracle.assert_same(seen_by_softmax(found), truth(name), TOLERANCE)


def test_later_turns_get_gradients_where_prompts_do_not() -> None:
    """An image behind a response is not in the prompt, so what its tokens leave goes on to the tower."""
    found = {}
    for max_tokens in (None, 9):
        result = oracle.scheduled(
            attached("qwen2_5_vl"),
            batch_of("qwen2_5_vl"),
            schedule="bounded",
            max_tokens_per_chunk=max_tokens,
            prefix_grad=False,
        )
        found[max_tokens] = result
    assert found[9].grads["model.visual.patch_embed.proj.weight"].norm() > 0
    oracle.assert_same(found[9], found[None], TOLERANCE)
