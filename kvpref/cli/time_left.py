"""Estimates how long a run will take from its first steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FIRST, LAST = 1, 5
"""The timed steps lie between the ends of these two, counted from where the run starts or resumes."""


WORTH_SAYING = 30.0
"""In seconds; a shorter wait is over before it is read."""


class TimeLeftCallback(TrainerCallback):
    """Reports once, after a few steps, how long the rest will take.

    Steps differ, so timed ones are compared with the rest by planned cost.

    Args:
        step_costs: The cost of each optimizer step of an epoch, in any unit.
        report: Takes the line.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        step_costs: Sequence[float],
        report: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._costs, self._report, self._clock = step_costs, report, clock
        self._start_step, self._started = 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start_step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        done = state.global_step - self._start_step
        if done == FIRST:
            self._started = self._clock()  # the first step also compiles, loads and allocates
        elif done == LAST and state.max_steps > state.global_step:
            timed = self._cost(state.global_step - (LAST - FIRST), state.global_step)
            left = self._cost(state.global_step, state.max_steps)
            seconds = (self._clock() - self._started) * left / timed if timed else 0.0
            if seconds >= WORTH_SAYING:
                self._report(
                    f"\nabout {in_words(seconds)} left, by the time of {LAST - FIRST} steps; evaluating and saving "
                    "come on top"
                )

    def _cost(self, start: int, end: int) -> float:
        """The cost of steps [start, end), assuming that later epochs are ordered like the first."""
        return sum(self._costs[step % len(self._costs)] for step in range(start, end))


def in_words(seconds: float) -> str:
    """``3 h 20 min``, ``4 min``, ``12 s``."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
