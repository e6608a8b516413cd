"""Remembered results of operators on fake tensors, against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kvpref.engine.options import EngineOptions
from kvpref.profiling.prediction import fake_results
from kvpref.profiling.prediction.model import TrainingSetup, build_fake_training
from kvpref.profiling.prediction.step import GroupShape, trace_step

aten = torch.ops.aten

SHAPE = GroupShape(prompt_tokens=30, response_tokens=9, num_responses=3)
MIXED = TrainingSetup(dtype=torch.float32, mixed_precision=torch.bfloat16)
STEPS = {
    "bounded": (EngineOptions(schedule="bounded", max_tokens_per_chunk=40), MIXED),
    "full, checkpoint all": (EngineOptions(checkpoint="all"), MIXED),
    "padded": (EngineOptions(mode="padded"), TrainingSetup()),
    "lora": (EngineOptions(mode="packed"), TrainingSetup(lora_r=2)),
}


class _Remembering(TorchDispatchMode):
    """Runs all operators as a fake step does."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return fake_results.run(self._mode, func, args, kwargs or {})


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_results, "_KNOWN", {})


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("model", ["llama", pytest.param("gemma2", marks=pytest.mark.full)])
def test_a_step_holds_the_same_at_every_operator(name: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, setup = STEPS[name]
    if setup.lora_r is not None:
        pytest.importorskip("peft")
    training = build_fake_training(tiny_config(model), setup)

    def trace() -> list[Any]:
        return trace_step(training, SHAPE.batch(2, ragged=options.mode == "padded"), options, "cuda")

    first = trace()
    num_known = len(fake_results._KNOWN)
    assert num_known > 100
    assert trace() == first  # now from memory
    assert len(fake_results._KNOWN) < 1.1 * num_known
    monkeypatch.setattr(fake_results, "run", lambda mode, func, args, kwargs: func(*args, **kwargs))
    assert trace() == first


CALLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "other sizes": lambda x: x[:, :3].mul(2),
    "other strides": lambda x: x.t().mul(2),
    "other dtypes": lambda x: x.to(torch.float64).mul(2),
    "another place": lambda x: x[1:].narrow(0, 1, 2),
    "an int for a float": lambda x: x.to(torch.int64).mul(2.5),
    "several tensors": lambda x: torch.cat([x, x[:1]]),
    "a dtype named": lambda x: x.sum(0, dtype=torch.float64),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_told_apart(name: str) -> None:
    mode = FakeTensorMode()
    with mode, _Remembering(mode):
        x = torch.empty(4, 6)
        x.mul(2), x.to(torch.int64).mul(2), x[:3].narrow(0, 1, 2), x.sum(0)
        found = [CALLS[name](x) for _ in range(2)]
    with mode:
        expected = CALLS[name](torch.empty(4, 6))
    for own in found:
        assert (own.shape, own.stride(), own.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert own.storage_offset() == expected.storage_offset()
        assert own.untyped_storage().nbytes() == expected.untyped_storage().nbytes()


def test_views_share_storage_and_new_tensors_do_not() -> None:
    mode = FakeTensorMode()
    with mode, _Remembering(mode):
        x = torch.empty(4, 6)
        for _ in range(2):
            assert x.view(24).untyped_storage()._cdata == x.untyped_storage()._cdata
            assert x.mul(2).untyped_storage()._cdata != x.untyped_storage()._cdata
            assert x.add_(x) is x


def test_what_depends_on_real_tensors_is_not_remembered() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, _Remembering(mode):
        x = torch.empty(4, 6)
        for rows in (torch.tensor([0, 1]), torch.tensor([0, 1, 2])):
            assert x.index_select(0, rows).shape[0] == len(rows)
