"""What a forward and backward costs on this device, measured on a few made-up micro-batches.

The seconds of micro-batches of different make-up are fitted by a sum of non-negative terms: per token, per attention
pair, per scored row, and per micro-batch. See `CostModel`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import nn

from kvpref.data import CostModel
from kvpref.data.batching.costs import pair_weights
from kvpref.engine.schedules import forward_backward
from kvpref.errors import InputError
from kvpref.losses import LossOutput
from kvpref.models.shape import model_shape
from kvpref.models.support import unwrap
from kvpref.plan.batch import Batch, collate
from kvpref.plan.flops import Work, count_work
from kvpref.profiling.timing import TimingOptions, time_rounds
from kvpref.records.groups import Group
from kvpref.records.groups import Sequence as TokenSequence
from kvpref.records.outputs import ResponseLogps

MIN_TOKENS = 256


class Measurement(NamedTuple):
    """One timed micro-batch."""

    work: Work

    seconds: float
    """Median time of a forward and backward."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A cost model in seconds, and how well it fits the measurements."""

    cost_model: CostModel

    relative_error: float
    """Root mean square of (predicted - measured) / measured seconds over the measured micro-batches."""

    device: str
    """Where it was measured, such as ``cpu`` or ``cuda:0 (NVIDIA H100 80GB HBM3)``."""

    measurements: tuple[Measurement, ...]
    """The micro-batches that were timed."""


class MakeUp(NamedTuple):
    """The shape of a made-up micro-batch."""

    num_groups: int
    prompt_tokens: int
    num_responses: int
    response_tokens: int


def calibrate(
    model: nn.Module,
    *,
    mode: str = "two_pass",
    backend: str = "auto",
    max_tokens: int = 2048,
    repeats: int = 3,
) -> Calibration:
    """Time micro-batches of random tokens on the model's device and fit a `CostModel` in seconds.

    Existing gradients are kept, and nothing is trained. It takes about thirty forwards and backwards of up to
    `max_tokens` tokens each.

    Args:
        model: An attached model, on the device where it will be used.
        mode: As in `kvpref.response_logps`; the weights hold for this mode.
        backend: Attention backend, or ``auto``.
        max_tokens: Tokens of the largest micro-batch, its prompt counted once per response. Costs beyond it are
            extrapolated.
        repeats: How often each micro-batch is timed, after one run to warm up.

    Raises:
        InputError: If `max_tokens` or `repeats` is too small, or the model has no weights to train.
    """
    if max_tokens < MIN_TOKENS or repeats < 1:
        raise InputError(
            f"calibration needs max_tokens of at least {MIN_TOKENS} and repeats of at least 1; "
            f"got {max_tokens} and {repeats}"
        )
    config = unwrap(model).config.get_text_config(decoder=True)
    device = next(model.parameters()).device
    longest = getattr(config, "max_position_embeddings", None) or max_tokens
    make_ups, shape = _make_ups(max_tokens, longest), model_shape(model)
    batches = [_make_batch(make_up, config.vocab_size, mode).to(device) for make_up in make_ups]
    cases = {
        str(index): partial(forward_backward, model, batch, _mean_logp, mode=mode, backend=backend)
        for index, batch in enumerate(batches)
    }
    with _training_without_traces(model):
        rounds_ms = time_rounds(cases, device, TimingOptions(num_rounds=repeats))
    measurements = tuple(
        Measurement(count_work(batch.plan(mode), shape.rules), statistics.median(times) / 1000)
        for batch, times in zip(batches, rounds_ms.values(), strict=True)
    )
    fitted, relative_error = fit_cost_model(measurements, shape.mean_pairs)
    cost_model = replace(fitted, **pair_weights(shape, fitted.per_pair, mode))
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return Calibration(cost_model=cost_model, relative_error=relative_error, device=name, measurements=measurements)


def fit_cost_model(
    measurements: Sequence[Measurement], mean_pairs: Callable[[Work], float] = attrgetter("num_pairs")
) -> tuple[CostModel, float]:
    """The cost model whose relative errors have the least sum of squares, and their root mean square.

    Args:
        measurements: The timed micro-batches.
        mean_pairs: Gives the query-key pairs per head, averaged over layers.

    Raises:
        ValueError: If there are fewer measurements than weights (four), or one took no time.
    """
    if any(measurement.seconds <= 0 for measurement in measurements):
        raise ValueError("a measurement took no time")
    seconds = torch.tensor([measurement.seconds for measurement in measurements], dtype=torch.float64)
    counts = torch.tensor(
        [[work.num_tokens, mean_pairs(work), work.num_scored, 1] for work, _ in measurements], dtype=torch.float64
    )
    # Each equation is divided by its seconds, so that a short micro-batch weighs as much as a long one.
    weighted, ones = counts / seconds[:, None], torch.ones_like(seconds)
    weights = fit_non_negative(weighted, ones)
    relative_error = float((weighted @ weights - ones).square().mean().sqrt())
    per_token, per_pair, per_scored, per_micro_batch = weights.tolist()
    model = CostModel(
        per_token=per_token,
        per_pair=per_pair,
        per_scored=per_scored,
        per_micro_batch=per_micro_batch,
        unit="seconds",
    )
    return model, relative_error


def fit_non_negative(matrix: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The x >= 0 with the least ||matrix @ x - target||, exactly; meant for a handful of columns.

    At the optimum the columns with x > 0 solve their own least-squares problem (Lawson and Hanson 1974, "Solving least
    squares problems", chapter 23), so every subset of columns is tried.

    Args:
        matrix: (num_equations, num_columns) float64, no fewer equations than columns.
        target: (num_equations,) float64.

    Returns:
        (num_columns,) float64.

    Raises:
        ValueError: If there are fewer equations than columns.
    """
    num_equations, num_columns = matrix.shape
    if num_equations < num_columns:
        raise ValueError(f"{num_columns} weights need as many measurements; got {num_equations}")
    # Columns differ by many powers of ten; at unit length they are not mistaken for dependent ones.
    norms = matrix.norm(dim=0)
    scale = torch.where(norms > 0, norms, 1.0)
    best, least = torch.zeros(num_columns, dtype=matrix.dtype), float(target.norm())
    for size in range(1, num_columns + 1):
        for columns in map(list, combinations(range(num_columns), size)):
            part = matrix[:, columns] / scale[columns]
            solution = torch.linalg.lstsq(part, target[:, None]).solution[:, 0]
            residual = float((part @ solution - target).norm())
            if bool((solution >= 0).all()) and residual < least:
                best, least = torch.zeros_like(best), residual
                best[columns] = solution / scale[columns]
    return best


def _make_ups(max_tokens: int, longest: int) -> tuple[MakeUp, ...]:
    """Micro-batches that differ in the share of tokens, attention pairs and scored rows, and in size."""
    half = min(max_tokens // 2, longest)
    short = min(max_tokens // 8, longest // 2)
    return (
        MakeUp(num_groups=1, prompt_tokens=8, num_responses=2, response_tokens=4),
        MakeUp(num_groups=2, prompt_tokens=16, num_responses=2, response_tokens=8),
        MakeUp(num_groups=max_tokens // 64, prompt_tokens=24, num_responses=2, response_tokens=8),
        MakeUp(num_groups=1, prompt_tokens=half - 8, num_responses=2, response_tokens=8),
        MakeUp(num_groups=1, prompt_tokens=8, num_responses=2, response_tokens=half - 8),
        MakeUp(num_groups=2, prompt_tokens=short, num_responses=2, response_tokens=short),
        MakeUp(num_groups=1, prompt_tokens=short, num_responses=6, response_tokens=short // 4),
    )


def _make_batch(make_up: MakeUp, vocab_size: int, mode: str) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def draw(num_tokens: int) -> list[int]:
        return torch.randint(vocab_size, (num_tokens,), generator=generator).tolist()

    groups = []
    for _ in range(make_up.num_groups):
        prompt = draw(make_up.prompt_tokens)
        groups.append(
            Group(
                [
                    TokenSequence.from_prompt_and_response(prompt, draw(make_up.response_tokens))
                    for _ in range(make_up.num_responses)
                ]
            )
        )
    return collate(groups, modes=(mode,))


def _mean_logp(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
    return LossOutput(loss=-policy.token_logps.mean(), metrics={})


@contextmanager
def _training_without_traces(model: nn.Module) -> Iterator[None]:
    """Training mode while open; gradients and mode are restored afterwards."""
    training = model.training
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        model.train()
        yield
    finally:
        model.train(training)
        for parameter, gradient in gradients:
            parameter.grad = gradient
