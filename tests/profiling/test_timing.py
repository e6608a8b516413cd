"""The order and number of runs. What they take is left to the machine: no test asserts a time."""

from __future__ import annotations

import pytest
import torch

from kvpref.profiling import timing
from kvpref.profiling.timing import TimingOptions, time_once, time_rounds

CPU = torch.device("cpu")


def logged(options: TimingOptions) -> tuple[list[str], dict[str, tuple[float, ...]]]:
    calls: list[str] = []
    cases = {name: lambda name=name: calls.append(name) for name in "abc"}
    return calls, time_rounds(cases, CPU, options)


def test_cases_take_turns_and_each_starts_a_round() -> None:
    calls, rounds = logged(TimingOptions(num_rounds=3, num_warmup=1))
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in rounds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value >= 0 for values in rounds.values() for value in values)


def test_a_spent_budget_stops_after_the_least_number_of_rounds() -> None:
    calls, rounds = logged(TimingOptions(num_rounds=9, num_warmup=0, budget_s=0.0, min_rounds=4))
    assert len(calls) == 3 * 4
    assert len(rounds["a"]) == 4


def test_no_budget_runs_all_rounds() -> None:
    assert len(logged(TimingOptions(num_rounds=2, num_warmup=0, budget_s=0.0, min_rounds=4))[0]) == 3 * 2


def test_times_are_milliseconds_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {name: iter([begin, begin + 0.25]).__next__ for name, begin in (("wall", 10.0), ("process", 3.0))}
    monkeypatch.setattr(timing, "CLOCKS", clocks)
    for name in clocks:
        options = TimingOptions(num_rounds=1, num_warmup=0, clock=name)
        assert time_rounds({"only": lambda: None}, CPU, options) == {"only": (250.0,)}


def test_unknown_clocks_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown clock 'sun'; choose from: wall, process"):
        TimingOptions(clock="sun")


@pytest.mark.parametrize("wrong", [{"num_rounds": 0}, {"min_rounds": 0}, {"num_warmup": -1}])
def test_options_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TimingOptions(**wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_times_end_with_the_last_kernel() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)

    def launch() -> None:
        for _ in range(20):
            matrix @ matrix

    assert time_once(launch, device) > 0
    assert torch.cuda.current_stream(device).query()
