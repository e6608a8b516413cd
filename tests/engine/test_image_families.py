"""More families whose prompts their own processors made, against each sequence alone."""

from __future__ import annotations

import pytest
from more_vision_families import MORE
from oracle import loss_weights
from vision_models import naive_vision_run, prompts_of_all_kinds, tiny_vision_model, vision_groups

import kvpref


@pytest.mark.parametrize("name", MORE)
def test_exact(name: str) -> None:
    # PaliGemma's processor takes no prompt without an image.
    prompts = [one for one in prompts_of_all_kinds() if one.pictures or name != "paligemma"]
    model, made = tiny_vision_model(name), vision_groups(name, prompts)
    expected = naive_vision_run(model, made)
    weights = loss_weights(made.groups).float()
    kvpref.attach(model)
    logps = kvpref.response_logps(model, kvpref.collate(made.groups, min_shared_tokens=1)).token_logps
    assert (logps - expected.token_logps).abs().max() < 1e-5
    (logps * weights).sum().backward()
    largest = max(grad.norm() for grad in expected.grads.values())
    for parameter, grad in expected.grads.items():
        found = model.get_parameter(parameter).grad
        difference = grad if found is None else found - grad
        assert difference.norm() <= 1e-4 * grad.norm().clamp(min=1e-3 * largest), parameter
