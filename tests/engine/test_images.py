"""Prompts with images: exact in every mode, towers and projectors included, and each image encoded once."""

from functools import partial

import pytest
import torch
from oracle import assert_same, loss_weights, precision, shared
from tiny_models import tiny_model
from vision_models import VisionPrompt, naive_vision_run, picture, tiny_vision_model, vision_groups

import kvpref
from kvpref import UnsupportedModelError
from kvpref.models.backbone import backbone
from kvpref.plan.modes import MODES

FAMILIES = ("gemma3", "llava", "qwen2_5_vl")


def attached(name, dtype=torch.float64):
    return kvpref.attach(tiny_vision_model(name, dtype))


def without_key_biases(result):
    """Softmax does not see a bias of keys, so its gradient is zero but for rounding."""
    biases = [name for name in result.grads if name.endswith("k_proj.bias") and "vision" in name]
    assert all(result.grads.pop(name).norm() < 1e-10 for name in biases)
    return result


@pytest.mark.parametrize("name", FAMILIES)
def test_every_mode_is_exact(name):
    made = vision_groups(name)
    truth = without_key_biases(naive_vision_run(tiny_vision_model(name, torch.float64), made))
    model = attached(name)
    for mode in MODES:
        found = without_key_biases(shared(model, kvpref.collate(made.groups), mode=mode))
        assert_same(found, truth, 1e-10)


def test_both_halves_give_what_the_whole_gives():
    made = vision_groups("qwen2_5_vl")
    model, batch = attached("qwen2_5_vl"), kvpref.collate(made.groups)
    cache = kvpref.encode_prefix(model, batch)
    halves = kvpref.score_responses(model, batch, cache)
    assert torch.equal(halves.token_logps, kvpref.response_logps(model, batch).token_logps)
    with pytest.raises(kvpref.InputError, match="another batch"):
        kvpref.score_responses(model, kvpref.collate(made.groups), cache)


@pytest.mark.parametrize(("mode", "num_images"), [("two_pass", 3), ("one_pass", 3), ("packed", 12), ("padded", 12)])
def test_the_tower_sees_each_image_once(mode, num_images):
    model, batch = attached("qwen2_5_vl"), kvpref.collate(vision_groups("qwen2_5_vl").groups)
    tower, seen = backbone(model).visual, []
    tower.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["grid_thw"].shape[0]), with_kwargs=True
    )
    kvpref.response_logps(model, batch, mode=mode)
    assert seen == [num_images]


def test_groups_do_not_leak_into_one_another():
    made = vision_groups("qwen2_5_vl")
    model = attached("qwen2_5_vl")
    with torch.no_grad():
        before = kvpref.response_logps(model, kvpref.collate(made.groups))
        other = changed_picture(made.groups[0])
        after = kvpref.response_logps(model, kvpref.collate([other, *made.groups[1:]]))
    own = torch.repeat_interleave(before.group_index, before.lengths()) == 0
    assert torch.equal(before.token_logps[~own], after.token_logps[~own])
    assert (before.token_logps[own] - after.token_logps[own]).abs().max() > 1e-3


def changed_picture(group):
    """The group with other pixels in its picture, of the same size."""
    (placed,) = group.sequences[0].images
    inputs = dict(placed.image.read())
    inputs["pixel_values"] = inputs["pixel_values"].flip(0)
    changed = kvpref.Image("other", placed.image.token_id, placed.image.num_tokens, partial(dict, inputs))
    place = kvpref.PlacedImage(changed, placed.runs)
    return kvpref.Group([kvpref.Sequence(s.input_ids, s.scored, [place]) for s in group.sequences])


def test_features_that_do_not_fit_are_refused():
    group = vision_groups("qwen2_5_vl").groups[0]
    (placed,) = group.sequences[0].images
    larger = vision_groups("qwen2_5_vl", [_prompt(picture(1, 64, 64))]).groups[0].sequences[0].images[0].image
    wrong = kvpref.Image("wrong", placed.image.token_id, placed.image.num_tokens, larger.read)
    place = kvpref.PlacedImage(wrong, placed.runs)
    batch = kvpref.collate([kvpref.Group([kvpref.Sequence(s.input_ids, s.scored, [place]) for s in group.sequences])])
    with pytest.raises(kvpref.RunError, match="placeholders"):
        kvpref.response_logps(attached("qwen2_5_vl"), batch)


def _prompt(image):
    return VisionPrompt("What is it?", (image,), ("A cat.", "A dog"))


def test_an_image_may_end_a_sequence():
    group = vision_groups("qwen2_5_vl").groups[0]
    sequence = group.sequences[0]
    end = sequence.images[0].runs[-1][1]
    scored = (False, True, *sequence.scored[2:end])  # a token before the image
    cut = kvpref.Sequence(sequence.input_ids[:end], scored, sequence.images)
    found = kvpref.response_logps(attached("qwen2_5_vl"), kvpref.collate([kvpref.Group([cut]), group]))
    assert found.token_logps.isfinite().all()


def test_models_that_read_no_images_are_refused():
    model = kvpref.attach(tiny_model("llama", torch.float32))
    with pytest.raises(UnsupportedModelError, match="reads none"):
        kvpref.response_logps(model, kvpref.collate(vision_groups("llava").groups))


def test_towers_keep_their_own_attention():
    model = attached("qwen2_5_vl", torch.float32)
    assert backbone(model).visual.config._attn_implementation == "eager"
    assert model.config.get_text_config()._attn_implementation == "kvpref"


@pytest.mark.parametrize("checkpoint", ["prefix", "all"])
def test_towers_are_checkpointed_with_the_prompts(checkpoint):
    made = vision_groups("qwen2_5_vl")
    truth = naive_vision_run(tiny_vision_model("qwen2_5_vl", torch.float64), made)
    model = attached("qwen2_5_vl")
    calls = []
    backbone(model).visual.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))

    batch = kvpref.collate(made.groups)
    with precision(model):
        logps = kvpref.response_logps(model, batch, checkpoint=checkpoint).token_logps
        (logps * loss_weights(made.groups).to(logps)).sum().backward()
    assert len(calls) == 2
    assert torch.allclose(logps, truth[0], rtol=0, atol=1e-10)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, truth[1][name], rtol=1e-8, atol=1e-10), name


def test_towers_stay_uncompiled():
    made = vision_groups("qwen2_5_vl")
    model, batch = attached("qwen2_5_vl", torch.float32), kvpref.collate(made.groups)
    plain = shared(model, batch)
    kvpref.compile_layers(model, backend="eager")
    assert_same(shared(model, batch), plain, 1e-5)
    layers = backbone(model)
    assert layers.visual.blocks[0]._compiled_call_impl is None
    assert layers.language_model.layers[0]._compiled_call_impl is not None
