"""The cases in which a sharded run is compared with one process."""

from __future__ import annotations

from itertools import product
from typing import Any

from fsdp2_runs import Case

_LOSSES = {"dpo": "dpo", "reward": "bradley_terry", "grpo": "grpo"}
_BOUNDED = {"schedule": "bounded", "max_tokens_per_chunk": 16}
_SCHEDULES: dict[str, dict[str, Any]] = {
    "full": {},
    "bounded": _BOUNDED,
    "gathered": {**_BOUNDED, "gather_weights": "step", "reduce_grads": "step"},
    "reduced": {**_BOUNDED, "gather_weights": "step"},
    "summed": {**_BOUNDED, "reduce_grads": "step"},
}
_ONLINE = {"precompute_reference": False}

MATRIX = {
    f"{weights}-{loss}-{schedule}": Case(loss=_LOSSES[loss], adapter=weights == "lora", settings=_SCHEDULES[schedule])
    for weights, loss, schedule in product(("whole", "lora"), _LOSSES, _SCHEDULES)
}
REFERENCES = {
    "copy": Case(settings=_ONLINE),
    "copy-bounded": Case(settings={**_ONLINE, **_BOUNDED}),
    "other": Case(settings=_ONLINE, second="other"),
    "other-stored": Case(second="other"),
    "adapter-off": Case(adapter=True, settings={**_ONLINE, "reference": "base"}),
    "adapter-off-bounded": Case(adapter=True, settings={**_ONLINE, **_BOUNDED, "reference": "base"}),
}
OTHERS = {
    "accumulated": Case(settings={"gradient_accumulation_steps": 2}),
    "accumulated-bounded": Case(settings={"gradient_accumulation_steps": 2, **_BOUNDED}),
    "checkpointed": Case(settings={"checkpoint": "all"}),
    "checkpointed-bounded": Case(settings={"checkpoint": "all", **_BOUNDED}),
    "one_pass": Case(settings={"mode": "one_pass"}),
    "padded": Case(settings={"mode": "padded", "max_tokens_per_micro_batch": 120}),
}
CASES = MATRIX | REFERENCES | OTHERS

SAMPLED = (
    "whole-dpo-full",
    "adapter-off-bounded",
    "whole-reward-gathered",
    "lora-grpo-reduced",
)
"""Whole weights and adapters, each loss, both schedules, two of the ways to gather and reduce."""
