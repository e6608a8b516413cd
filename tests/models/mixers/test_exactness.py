"""Models with recurrent and convolution layers against the naive oracle: log-probs and every gradient."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import oracle
import pytest
import torch
from hybrid_groups import hybrid_groups
from tiny_hybrids import HYBRIDS, tiny_hybrid
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import kvpref
from kvpref import UnsupportedModelError

# Rounding in sums in another order, through decays and up to four layers; fp32 as the project states it for gradients.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-3}

ONE_PER_KIND = ("FalconMamba", "Lfm2", "Mamba2", "MiniMax", "Qwen3_5Text")

SETTINGS: dict[str, dict[str, Any]] = {
    "two_pass": {},
    "two_pass, checkpointed": {"checkpoint": "all"},
    "one_pass": {"mode": "one_pass"},
    "one_pass, checkpointed": {"mode": "one_pass", "checkpoint": "all"},
    "packed": {"mode": "packed"},
    "packed, checkpointed": {"mode": "packed", "checkpoint": "all"},
    "bounded": {"schedule": "bounded"},
    "bounded by 5": {"schedule": "bounded", "max_tokens_per_chunk": 5},
    "bounded by 5, checkpointed": {"schedule": "bounded", "max_tokens_per_chunk": 5, "checkpoint": "all"},
    "bounded by 1": {"schedule": "bounded", "max_tokens_per_chunk": 1},
}

QUICK = ("two_pass", "one_pass, checkpointed", "packed", "bounded by 5, checkpointed")


@cache
def _model(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, oracle.Result]:
    """An attached model, and the truth."""
    model = tiny_hybrid(name, dtype)
    truth = oracle.naive(oracle.twin(model), hybrid_groups())
    return kvpref.attach(model), truth


def _params() -> list[Any]:
    return [
        pytest.param(
            name, dtype, setting, marks=() if name in ONE_PER_KIND and _is_quick(dtype, setting) else pytest.mark.full
        )
        for name in HYBRIDS
        for dtype in TOLERANCES
        for setting in SETTINGS
    ]


def _is_quick(dtype: torch.dtype, setting: str) -> bool:
    return setting in QUICK and dtype == torch.float64


@pytest.mark.parametrize(("name", "dtype", "setting"), _params())
def test_log_probs_and_gradients(name: str, dtype: torch.dtype, setting: str) -> None:
    model, truth = _model(name, dtype)
    batch = kvpref.collate(hybrid_groups(), min_shared_tokens=1)
    oracle.assert_same(oracle.scheduled(model, batch, **SETTINGS[setting]), truth, TOLERANCES[dtype])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["FalconH1", "KimiLinear", "NemotronH", "Qwen3Next", "Zamba2"])
def test_families_that_differ_most(name: str) -> None:
    """Mixer and attention in one layer, other decays, layers without either, experts, layers in layers."""
    model, truth = _model(name, torch.float64)
    batch = kvpref.collate(hybrid_groups(), min_shared_tokens=1)
    found = oracle.scheduled(model, batch, schedule="bounded", max_tokens_per_chunk=7)
    oracle.assert_same(found, truth, TOLERANCES[torch.float64])


@pytest.mark.parametrize("mode", ["two_pass", "padded"])
def test_a_checkpoint_of_another_kind(mode: str) -> None:
    """It does not say which pass it recomputes; an ordinary forward needs none."""
    model, _ = _model("Lfm2", torch.float64)
    wrapped = copy.deepcopy(model)
    layer = wrapped.model.layers[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    logps = kvpref.response_logps(wrapped, kvpref.collate(hybrid_groups()), mode=mode).token_logps
    if mode == "padded":
        logps.sum().backward()
        return
    with pytest.raises(UnsupportedModelError, match="a checkpoint other than transformers' own"):
        logps.sum().backward()
