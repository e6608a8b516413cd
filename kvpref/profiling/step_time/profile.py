"""Where the time of training steps goes: the events of `torch.profiler`, summed by pass and by what they compute.

Every event has a self time, its time without the events inside it, so the self times below a step add up to the step.
On a CUDA device an event's own time is that of the kernels that it started itself; they add up to the device's busy
time. Each self time is counted once, at the place given by the names around it:

- the engine's regions (`kvpref.tracing`) say which pass or the vision tower runs, and whether it is recomputed;
- a node of autograd belongs to the pass of the forward operator with the same sequence number, which the profiler
  records for both: the backward of several passes runs in one region, and on CUDA in a separate thread;
- ranges in the attention operators and operators' names say what is computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kvpref.tracing import PREFIX

STEP = f"{PREFIX}step"
"""The range around each step."""

NODE = "autograd::engine::evaluate_function: "
"""Prefix of the names of autograd's nodes."""

OTHER, TOWER = "other", "vision tower"
PARTS = (
    "attention self",
    "attention cross",
    "attention merge",
    "linear",
    "lm head",
    "loss",
    "optimizer",
    "data",
    OTHER,
)
"""The parts of a step. ``attention merge`` is everything that attention operators do around their blocks' kernels,
``linear`` matrix products outside the LM head. ``other`` is everything else inside a step: norms, activations, rotary
and token embeddings, gathers, sums of gradients, and Python between operators."""

PHASES = ("forward", "recompute", "backward", "step")
"""``recompute`` is a forward that ran before without a graph; ``step`` is what belongs to no pass."""

_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in (
        "linear",
        "matmul",
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "_addmm_activation",
        "mkldnn_linear",
        "_scaled_mm",
    )
)
_PRODUCT_NODE = re.compile(r"(Addmm|Mm|Bmm|Baddbmm|Linear|MkldnnLinear)Backward\d*$")
_CASCADE = re.compile(r"kvpref(::|_)cascade_")
_WHOLE_ATTENTION = re.compile(r"aten::_?scaled_dot_product\w*$|ScaledDotProduct\w*Backward\d*$")
_PASS = re.compile(r"(recompute |backward )?(pass \d+|vision tower)$")
_PASS_PHASES = {None: "forward", "recompute ": "recompute", "backward ": "backward"}


class Event(Protocol):
    """The fields read from a `torch.autograd.profiler_util.FunctionEvent`."""

    name: str
    sequence_nr: int
    cpu_children: Sequence[Event]


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place that an event's self time is counted under."""

    stage: str
    """``vision tower``, ``pass 0``, ``pass 1``, ..., or a part that is its own stage: ``lm head``, ``loss``,
    ``optimizer``, ``data``, ``other``."""

    phase: str
    """One of `PHASES`."""

    part: str
    """One of `PARTS`."""


OUTSIDE = Place(stage=OTHER, phase="step", part=OTHER)


@dataclass(frozen=True, kw_only=True)
class TimeEntry:
    """The time of one place."""

    place: Place

    ms: float
    """Milliseconds per step."""


def attribute(roots: Sequence[Event], own_time: Callable[[Event], float], num_steps: int) -> tuple[TimeEntry, ...]:
    """Sum the own times of events by place.

    Args:
        roots: Events without a parent: those named `STEP`, and autograd's nodes if they ran in another thread.
            Anything else ran outside the steps and does not count.
        own_time: An event's own time in microseconds.
        num_steps: Number of steps, by which times are divided.

    Returns:
        One entry per place with nonzero time, in the order of stages, phases and parts.
    """
    counted = [root for root in roots if root.name == STEP or root.name.startswith(NODE)]
    stages = _stages_of_operators(counted)
    sums: dict[Place, float] = {}
    for event, place in _walk(counted, stages):
        sums[place] = sums.get(place, 0.0) + own_time(event)
    entries = [TimeEntry(place=place, ms=time_us / 1000 / num_steps) for place, time_us in sums.items() if time_us]
    return tuple(sorted(entries, key=lambda entry: _rank(entry.place)))


def _rank(place: Place) -> tuple[int, int, int, int]:
    match = _PASS.match(place.stage)
    number = int(place.stage.removeprefix("pass ").replace(TOWER, "-1")) if match else len(PARTS)
    stage = PARTS.index(place.stage) if place.stage in PARTS else -1
    return stage, number, PHASES.index(place.phase), PARTS.index(place.part)


def _stages_of_operators(roots: Sequence[Event]) -> dict[int, str]:
    """Sequence number -> the stage whose forward made the node with this number.

    Operators that make no node carry the number of the next one that does, so the last one counts.
    """
    stages: dict[int, str] = {}
    for event, place in _walk(roots, {}):
        if event.sequence_nr >= 0 and place.phase != "backward":
            stages[event.sequence_nr] = place.stage
    return stages


def _walk(roots: Sequence[Event], stages: Mapping[int, str]) -> Iterator[tuple[Event, Place]]:
    """All events with their places, tree by tree, in the order in which they started."""
    waiting = [(root, OUTSIDE) for root in reversed(roots)]
    while waiting:
        event, around = waiting.pop()
        place = _place(event, around, stages)
        yield event, place
        waiting.extend((child, place) for child in reversed(event.cpu_children))


def _place(event: Event, around: Place, stages: Mapping[int, str]) -> Place:
    name = event.name
    if name.startswith(PREFIX):
        return _place_of_region(name.removeprefix(PREFIX), around)
    if name.startswith(NODE):
        # Gradients add up in the parameters, over all passes: such nodes have no number of their own.
        stage = stages.get(event.sequence_nr, OTHER)
        part = stage if stage in PARTS else OTHER
        if part == OTHER and _PRODUCT_NODE.search(name):
            part = "linear"
        if _CASCADE.search(name):
            part = "attention merge"
        return Place(stage=stage, phase="backward", part=part)
    if name.startswith("Optimizer."):
        return _alone("optimizer")
    if around.part == OTHER and name in _PRODUCTS:
        return replace(around, part="linear")
    if _CASCADE.search(name):
        # Kernels without an operator, such as Triton's, count towards the operator that starts them.
        return replace(around, part="attention merge")
    if around.part == OTHER and _WHOLE_ATTENTION.match(name):
        # Mode padded runs transformers' own attention, where nothing is shared.
        return replace(around, part="attention self")
    return around


def _place_of_region(region: str, around: Place) -> Place:
    match = _PASS.match(region)
    if match:
        return Place(stage=match[2], phase=_PASS_PHASES[match[1]], part=OTHER)
    if region in ("optimizer", "data"):
        return _alone(region)
    if region in ("lm head", "loss"):
        return Place(stage=region, phase="recompute" if around.phase == "recompute" else "forward", part=region)
    if region == "backward":
        return Place(stage=OTHER, phase="backward", part=OTHER)
    return replace(around, part=region) if region in PARTS else around


def _alone(stage: str) -> Place:
    return Place(stage=stage, phase="step", part=stage)
