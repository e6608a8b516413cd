"""What towers compute against PyTorch's counter over whole steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes as without_counting
from torch.utils.flop_counter import FlopCounterMode
from vision_models import prompts_of_all_kinds, tiny_vision_model, vision_groups

import kvpref
from kvpref.engine import mode_program
from kvpref.models.vision.flops import VisionFlops
from kvpref.profiling.steps import TrainStep, make_micro_batches
from kvpref.state.image_features import ImageFeatures

FAMILIES = ("qwen2_5_vl", "gemma3", "llava")


def mean_nll(policy: kvpref.ResponseLogps, reference: object, batch: kvpref.Batch) -> kvpref.LossOutput:
    return kvpref.LossOutput(-policy.mean().mean(), {})


def one_step(model: nn.Module, name: str, mode: str) -> TrainStep:
    groups = vision_groups(name, prompts_of_all_kinds()[:3]).groups
    micro_batches = make_micro_batches(model, [groups[:2], groups[2:]], mean_nll, mode=mode, device=torch.device("cpu"))
    return TrainStep(model, mean_nll, micro_batches, mode)


def counted(step: TrainStep, monkeypatch: pytest.MonkeyPatch) -> int:
    """By PyTorch's counter: FLOPs of the whole step, less those of the same step that is given all features."""
    run_tower, totals = mode_program.image_features, []

    def features_without_graph(*args: Any) -> ImageFeatures:
        with without_counting(), torch.no_grad():
            return run_tower(*args)

    for run in (run_tower, features_without_graph):
        monkeypatch.setattr(mode_program, "image_features", run)
        with FlopCounterMode(display=False) as counter:
            step.run()
        totals.append(counter.get_total_flops())
    return totals[0] - totals[1]


@pytest.mark.parametrize("mode", ["two_pass", "padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_count_is_that_of_a_whole_step(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per image in the modes that share, once per sequence otherwise; the projector included."""
    model = kvpref.attach(tiny_vision_model(name))
    step = one_step(model, name, mode)
    assert step.flops().vision == counted(step, monkeypatch) > 0


def test_frozen_towers_have_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kvpref.attach(tiny_vision_model("gemma3"))
    whole = one_step(model, "gemma3", "two_pass").flops().vision
    model.model.vision_tower.requires_grad_(False)
    step = one_step(model, "gemma3", "two_pass")
    without = step.flops().vision
    assert without < 0.5 * whole
    assert without == counted(step, monkeypatch)


def test_counting_leaves_the_model_as_it_is() -> None:
    model = kvpref.attach(tiny_vision_model("gemma3"))
    step = one_step(model, "gemma3", "two_pass")
    before = torch.get_rng_state()
    step.flops()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fused_attention_counts_like_that_of_products() -> None:
    """The counter knows no kernel of the CPU; in the backward pass a fused one computes the scores again."""
    batch = kvpref.collate(vision_groups("gemma3", prompts_of_all_kinds()[:1]).groups)
    found = {}
    for kind in ("eager", "sdpa"):
        model = kvpref.attach(tiny_vision_model("gemma3"))
        model.model.vision_tower.set_attn_implementation(kind)
        model.requires_grad_(False)
        forward = VisionFlops(model).of(batch.images, batch.image_inputs())
        model.requires_grad_(True)
        found[kind] = forward, VisionFlops(model).of(batch.images, batch.image_inputs())
    assert found["eager"][0] == found["sdpa"][0]
    assert found["eager"][1] < found["sdpa"][1] < 1.2 * found["eager"][1]
