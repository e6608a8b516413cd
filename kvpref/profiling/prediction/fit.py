"""The largest budgets that fit into a device's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from kvpref.data.batching.costs import SHARING_MODES
from kvpref.engine.options import EngineOptions
from kvpref.profiling.prediction.peak import PeakPrediction, Predictor
from kvpref.profiling.prediction.step import GroupShape

_TOKENS_PER_CHUNK_STEP = range(256, 1025)
"""Chunk bounds are tried in multiples of a response's tokens, if these lie in this range, or else of its start."""

MAX_TOKENS_TRIED = 2**19
"""Largest micro-batch tried, in tokens that run through the model."""

MAX_RESPONSES_TRIED = 4096
"""Largest number of responses tried."""

MAX_IMAGES_TRIED = 64
"""Most runs of a tower in a micro-batch tried: many towers take images one by one, and so does predicting them."""

_MAX_SECANTS = 8


@dataclass(frozen=True, kw_only=True)
class VariantPlan:
    """What one way to run a micro-batch needs, and the largest micro-batch that fits."""

    name: str
    variant: EngineOptions
    """The options; in the bounded schedule, with the largest `max_tokens_per_chunk` that fits."""

    one_group: PeakPrediction
    """The peak for one group; in the bounded schedule with `variant`'s bound, or the smallest one tried."""

    num_groups: int
    """Groups of the largest micro-batch that fits; 0 if not even one fits. 1 in the bounded schedule."""

    largest: PeakPrediction | None
    """Its peak; None if nothing fits."""

    max_tokens_per_micro_batch: int
    """Its tokens, counted as the mode counts them; 0 if nothing fits."""

    max_responses: int
    """Most responses of one group that fit; 0 if not even one fits. In the bounded schedule with `variant`'s bound."""

    at_limit: tuple[str, ...] = ()
    """Which of ``groups`` and ``responses`` reached the largest number tried; more may fit."""

    @property
    def fits(self) -> bool:
        return self.largest is not None


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The largest number that fits."""

    number: int
    """0 if none does."""

    at_limit: bool
    """Whether it is the largest number allowed."""


def largest_fitting(
    peak_of: Callable[[int], int],
    budget_bytes: int,
    *,
    resident_bytes: int,
    first: int,
    limit: int,
    lines_from: int = 1,
) -> Largest:
    """The largest number up to `limit` whose peak is within the budget.

    A peak is the highest of a step's moments, each of which grows along a line: so it bends upwards, and beyond two
    numbers that were tried it lies on the line through them or above it. Each try is where the line through the two
    tries before meets the budget. The search ends when a number was tried and fits, and the next one does not: by its
    own peak, or by the line through two others.

    Args:
        peak_of: Number -> peak, in bytes.
        budget_bytes: The memory that must hold it.
        resident_bytes: The approximate peak of a number of 0.
        first: The number to try first, from 1 to `limit`.
        limit: The largest number to try.
        lines_from: The smallest number that runs as all larger ones do.
    """
    fits, fails = 0, limit + 1
    if resident_bytes >= budget_bytes:
        return Largest(number=0, at_limit=False)
    tried = [(0, resident_bytes)]
    number = first
    while fails - fits > 1:
        tried.append((number, peak_of(number)))
        if tried[-1][1] <= budget_bytes:
            fits = number
        else:
            fails = number
        on_lines = [point for point in tried if point[0] >= lines_from]
        if fits >= lines_from - 1 and _lines_exclude(on_lines, fits + 1, budget_bytes):
            fails = fits + 1
        number = min(max(_next_try(tried, fits, fails, budget_bytes), fits + 1), fails - 1)
    return Largest(number=fits, at_limit=fits == limit)


def _lines_exclude(tried: Sequence[tuple[int, int]], number: int, budget_bytes: int) -> bool:
    """Whether a line through two numbers that were tried, and do not enclose this one, leaves the budget there."""
    return any(
        peak1 > peak0 and not n0 <= number <= n1 and peak1 + (number - n1) * (peak1 - peak0) // (n1 - n0) > budget_bytes
        for (n0, peak0), (n1, peak1) in pairwise(sorted(tried))
    )


def _next_try(tried: Sequence[tuple[int, int]], fits: int, fails: int, budget_bytes: int) -> int:
    (n0, peak0), (n1, peak1) = tried[-2:]
    if peak1 == peak0 or len(tried) > _MAX_SECANTS:
        return (fits + fails) // 2
    return n0 + (budget_bytes - peak0) * (n1 - n0) // (peak1 - peak0)


def plan_variant(
    name: str, variant: EngineOptions, predictor: Predictor, shape: GroupShape, budget_bytes: int
) -> VariantPlan:
    """Find the largest budgets of one variant.

    Args:
        name: For display.
        variant: The options, whose `max_tokens_per_chunk` is found here.
        predictor: The predictor of the model.
        shape: The shape of the groups.
        budget_bytes: Memory that a step may hold.
    """
    plan = _plan_bounded if variant.schedule == "bounded" else _plan_kept
    return plan(name, variant, predictor, shape, budget_bytes)


def _plan_kept(
    name: str, variant: EngineOptions, predictor: Predictor, shape: GroupShape, budget_bytes: int
) -> VariantPlan:
    """For schedules that keep the whole micro-batch, where groups and responses add up."""
    given = shape.num_responses
    one = predictor.peak(variant, shape)

    def peak(num_groups: int, num_responses: int) -> PeakPrediction:
        return predictor.peak(variant, replace(shape, num_responses=num_responses), num_groups)

    def search(peak_of: Callable[[int], PeakPrediction], first: int, limit: int, lines_from: int = 1) -> Largest:
        return largest_fitting(
            lambda number: peak_of(number).total_bytes,
            budget_bytes,
            resident_bytes=one.resident_bytes,
            first=first,
            limit=limit,
            lines_from=lines_from,
        )

    num_images = 0 if shape.start is None else len(shape.start.images)
    repeats = variant.mode not in SHARING_MODES
    max_groups = max(1, MAX_TOKENS_TRIED // num_tokens(variant.mode, shape))
    max_responses = min(MAX_RESPONSES_TRIED, max_groups * given)
    if num_images:
        max_groups = min(max_groups, max(1, MAX_IMAGES_TRIED // (num_images * (given if repeats else 1))))
    if num_images and repeats:
        max_responses = min(max_responses, MAX_IMAGES_TRIED // num_images)
    groups = search(lambda number: peak(number, given), 1, max_groups)
    responses = search(lambda number: peak(1, number), given, max(given, max_responses), lines_from=2)
    return VariantPlan(
        name=name,
        variant=variant,
        one_group=one,
        num_groups=groups.number,
        largest=peak(groups.number, given) if groups.number else None,
        max_tokens_per_micro_batch=groups.number * num_tokens(variant.mode, shape),
        max_responses=responses.number,
        at_limit=_names(groups=groups.at_limit, responses=responses.at_limit),
    )


def _plan_bounded(
    name: str, variant: EngineOptions, predictor: Predictor, shape: GroupShape, budget_bytes: int
) -> VariantPlan:
    """For the bounded schedule, where only a chunk adds up.

    Chunks of responses are alike, so bounds are tried with the responses of two chunks, and the result once with all.
    """
    longest = max(shape.prompt_tokens, shape.num_responses * shape.response_tokens)
    unit = shape.response_tokens if shape.response_tokens in _TOKENS_PER_CHUNK_STEP else _TOKENS_PER_CHUNK_STEP[0]
    limit = -(-longest // unit)

    def with_bound(steps: int) -> EngineOptions:
        return replace(variant, max_tokens_per_chunk=steps * unit)

    def peak(steps: int) -> PeakPrediction:
        two_chunks = max(1, -(-2 * steps * unit // shape.response_tokens))
        return predictor.peak(with_bound(steps), replace(shape, num_responses=min(shape.num_responses, two_chunks)))

    resident_bytes = predictor.resident_bytes(variant)
    # Often one chunk for all fits. What cannot fit is shown with half of that.
    first = limit if resident_bytes < budget_bytes else max(1, limit // 2)
    steps = largest_fitting(
        lambda steps: peak(steps).total_bytes,
        budget_bytes,
        resident_bytes=resident_bytes,
        first=first,
        limit=limit,
    ).number
    while steps and predictor.peak(with_bound(steps), shape).total_bytes > budget_bytes:
        steps -= 1
    whole = predictor.peak(with_bound(steps), shape) if steps else peak(first)
    responses = _bounded_responses(with_bound(steps), predictor, shape, budget_bytes) if steps else 0
    return VariantPlan(
        name=name,
        variant=with_bound(steps or first),
        one_group=whole,
        num_groups=1 if steps else 0,
        largest=whole if steps else None,
        max_tokens_per_micro_batch=shape.unique_tokens if steps else 0,
        max_responses=responses,
        at_limit=_names(responses=responses == MAX_RESPONSES_TRIED),
    )


def _bounded_responses(variant: EngineOptions, predictor: Predictor, shape: GroupShape, budget_bytes: int) -> int:
    """By linear extrapolation: more responses mean more chunks, of which only what is kept per token adds up."""
    assert variant.max_tokens_per_chunk is not None
    added = max(1, variant.max_tokens_per_chunk // shape.response_tokens)
    low, high = (
        predictor.peak(variant, replace(shape, num_responses=number)).total_bytes
        for number in (shape.num_responses, shape.num_responses + added)
    )
    more = MAX_RESPONSES_TRIED if high <= low else (budget_bytes - low) * added // (high - low)
    return min(MAX_RESPONSES_TRIED, shape.num_responses + more)


def num_tokens(mode: str, shape: GroupShape) -> int:
    """Tokens of one group in a mode, counted like `max_tokens_per_micro_batch`."""
    return shape.unique_tokens if mode in SHARING_MODES else shape.total_tokens


def _names(**are_set: bool) -> tuple[str, ...]:
    return tuple(name for name, is_set in are_set.items() if is_set)
