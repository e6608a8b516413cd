"""Lanes as streams of CUDA; made-up streams stand in for them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kvpref.state.lanes import lanes_of


class Stream:
    def __init__(self, name: Any) -> None:
        self.name, self.waits = name, []

    def record_event(self) -> str:
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.waits.append(event)


def test_on_cuda_lanes_are_two_streams_and_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 1)
    made: list[Stream] = []
    current, entered = [Stream("forward")], []

    @contextmanager
    def enter(stream: Stream) -> Any:
        entered.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(Stream(device)) or made[-1])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", enter)
    lanes = lanes_of.__wrapped__(device)
    assert [stream.name for stream in made] == [device, device]
    lanes.up.wait(lanes.compute.record())
    assert [stream.waits for stream in made] == [["event of forward"], []]
    with lanes.down.running():
        pass
    assert entered == made[1:]
    current.append(Stream("another"))  # asked for anew: autograd has threads of its own
    lanes.compute.wait(lanes.down.record())
    assert [stream.waits for stream in current] == [[], ["event of cuda:1"]]


def test_elsewhere_everything_runs_in_order() -> None:
    lanes = lanes_of(torch.device("cpu"))
    for lane in lanes:
        lane.wait(lane.record())
        with lane.running():
            assert torch.ones(1).item() == 1
