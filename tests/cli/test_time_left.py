"""How long a run will take, told after its first steps."""

from __future__ import annotations

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from kvpref.cli.time_left import TimeLeftCallback, in_words


def told(costs: list[float], seconds_per_cost: float, *, start: int = 0, max_steps: int = 20) -> list[str]:
    """What a run says whose steps take as long as they cost, but for the first one."""
    now, lines = 0.0, []
    callback = TimeLeftCallback(costs, lines.append, clock=lambda: now)
    args, control = TrainingArguments("unused", use_cpu=True), TrainerControl()
    state = TrainerState(max_steps=max_steps, global_step=start)
    callback.on_train_begin(args, state, control)
    for step in range(start, max_steps):
        now += 1000.0 if step == start else costs[step % len(costs)] * seconds_per_cost
        state.global_step = step + 1
        callback.on_step_end(args, state, control)
    return lines


@pytest.mark.parametrize("start", [0, 7])
def test_long_steps_to_come_count_as_such(start: int) -> None:
    costs = [1.0] * 10 + [3.0] * 10
    (line,) = told(costs, 60.0, start=start)
    left = sum(costs[start + 5 :])
    assert line.startswith(f"\nabout {int(left)} min left, by the time of 4 steps")


def test_epochs_repeat_the_first_ones_costs() -> None:
    (line,) = told([1.0, 2.0], 60.0, max_steps=10)
    assert line.startswith("\nabout 8 min left")  # steps 6 to 10: 2 + 1 + 2 + 1 + 2


def test_short_runs_say_nothing() -> None:
    assert told([1.0], 60.0, max_steps=5) == []
    assert told([1.0], 1.0) == []  # 15 seconds


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 s"), (42.4, "42 s"), (65, "1 min"), (3540, "59 min"), (3600, "1 h 0 min"), (12000, "3 h 20 min")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
