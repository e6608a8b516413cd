"""Images on CUDA beside float64 on the CPU: towers, positions of the model, and image tokens that see both ways."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from vision_models import tiny_vision_model, vision_groups

import kvpref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BOUNDED = {"schedule": "bounded", "max_tokens_per_chunk": 16}
SCHEDULES: dict[str, dict[str, Any]] = {
    "full": {},
    "bounded": BOUNDED,
    "bounded, host": {**BOUNDED, "prefix_cache": "cpu"},
    "bounded, checkpointed": {**BOUNDED, "checkpoint": "all"},
}


def run(model: torch.nn.Module, name: str, device: str, **options: Any) -> oracle.Result:
    batch = kvpref.collate(vision_groups(name).groups, device=device)
    return oracle.scheduled(model, batch, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "llava"])
def test_images_match_the_cpu(name: str, schedule: str) -> None:
    exact = kvpref.attach(tiny_vision_model(name, torch.float64))
    model = kvpref.attach(tiny_vision_model(name, torch.float32).to("cuda"))
    truth, found = run(exact, name, "cpu"), run(model, name, "cuda", **SCHEDULES[schedule])
    # float32: some hundred additions in another order, TF32 off by default
    assert oracle.relative_error(found.token_logps.cpu(), truth.token_logps) <= 1e-4
    for parameter, grad in truth.grads.items():
        if grad.norm() > 1e-3:  # some vanish but for rounding
            assert oracle.relative_error(found.grads[parameter].cpu(), grad) <= 1e-3, parameter
