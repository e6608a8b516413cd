"""Fitting costs to measured seconds, and measuring without a trace."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from kvpref.data import CostModel
from kvpref.errors import InputError
from kvpref.models.attach import attach
from kvpref.plan.flops import Work, count_work
from kvpref.profiling.calibration import (
    Measurement,
    _make_batch,
    _make_ups,
    calibrate,
    fit_cost_model,
    fit_non_negative,
)


def measurements_of(model: CostModel, noise: float = 0.0) -> list[Measurement]:
    generator = random.Random(0)
    works = [
        Work(generator.randint(10, 5000), generator.randint(10, 10**6), generator.randint(1, 2000)) for _ in range(9)
    ]
    return [Measurement(work, model.cost(work) * (1 + noise * (-1) ** index)) for index, work in enumerate(works)]


# Four shapes of devices: from one where launching is all to one where only attention counts.
MODELS = [
    CostModel(per_token=2e-5, per_pair=3e-9, per_scored=4e-5, per_micro_batch=0.02, unit="seconds"),
    CostModel(per_token=0.0, per_pair=1e-8, per_scored=0.0, per_micro_batch=0.0, unit="seconds"),
    CostModel(per_token=1e-7, per_pair=0.0, per_scored=1e-6, per_micro_batch=0.5, unit="seconds"),
    CostModel(per_token=0.0, per_pair=2e-9, per_scored=1e-5, per_micro_batch=1e-4, unit="seconds"),
]


@pytest.mark.parametrize("model", MODELS)
def test_known_costs_are_recovered(model):
    fitted, error = fit_cost_model(measurements_of(model))
    # Double precision over weights that differ by seven powers of ten; the pairs' share is the least of them.
    for name in ("per_token", "per_pair", "per_scored", "per_micro_batch"):
        assert getattr(fitted, name) == pytest.approx(getattr(model, name), rel=1e-6, abs=1e-12)
    assert fitted.unit == "seconds"
    assert error < 1e-9


def test_the_error_is_the_root_mean_square_of_relative_errors():
    measured = measurements_of(MODELS[0], noise=0.1)
    fitted, error = fit_cost_model(measured)
    squares = [(fitted.cost(work) / seconds - 1) ** 2 for work, seconds in measured]
    assert error == pytest.approx((sum(squares) / len(squares)) ** 0.5)
    assert 0.01 < error <= 0.102  # no worse than the weights that the noise was put on


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(4, 8))
def test_no_other_non_negative_weights_fit_better(seed, num_columns, num_equations):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(num_equations, num_columns, generator=generator, dtype=torch.float64)
    target = torch.randn(num_equations, generator=generator, dtype=torch.float64)
    solution = fit_non_negative(matrix, target)
    assert (solution >= 0).all()
    # The conditions of Karush, Kuhn and Tucker, which only the minimum fulfils: no weight wants to grow, and those
    # above zero do not want to shrink either.
    slope = matrix.T @ (target - matrix @ solution)
    assert (slope <= 1e-9).all()
    assert (slope * solution).abs().max() <= 1e-9


def test_columns_that_depend_on_one_another_are_fitted():
    column = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    matrix = torch.stack((column, column), dim=1)
    assert (matrix @ fit_non_negative(matrix, column) - column).norm() < 1e-12


def test_too_few_measurements_and_none_of_time_are_refused():
    with pytest.raises(ValueError, match="4 weights need as many measurements; got 3"):
        fit_cost_model(measurements_of(MODELS[0])[:3])
    with pytest.raises(ValueError, match="took no time"):
        fit_cost_model([Measurement(Work(1, 1, 1), 0.0)] * 4)


@pytest.mark.parametrize("mode", ["two_pass", "packed", "padded"])
def test_made_up_batches_tell_the_four_costs_apart(mode):
    works = [count_work(_make_batch(make_up, 1000, mode).plan(mode)) for make_up in _make_ups(512, 512)]
    assert all(work.num_tokens <= 512 for work in works)
    counts = torch.tensor([[*work[:3], 1] for work in works], dtype=torch.float64)
    assert torch.linalg.cond(counts / counts.norm(dim=0)) < 50


@pytest.mark.parametrize("mode", ["two_pass", "padded"])
def test_calibration_measures_and_leaves_no_trace(mode):
    model = attach(tiny_model("llama")).eval()
    first = next(model.parameters())
    first.grad = kept = torch.ones_like(first)
    before = [parameter.clone() for parameter in model.parameters()]
    calibration = calibrate(model, mode=mode, max_tokens=256, repeats=1)
    assert first.grad is kept
    assert torch.equal(kept, torch.ones_like(first))
    assert all(parameter.grad is None for parameter in list(model.parameters())[1:])
    assert all(map(torch.equal, model.parameters(), before))
    assert not model.training
    assert (calibration.device, calibration.cost_model.unit) == ("cpu", "seconds")
    assert calibration.cost_model.cost(Work(100, 100, 100)) > 0
    assert all(measurement.seconds > 0 for measurement in calibration.measurements)
    _, error = fit_cost_model(calibration.measurements)
    assert error == pytest.approx(calibration.relative_error)


def test_calibration_stays_within_the_models_positions():
    # A longer sequence would have no position embedding.
    model = attach(tiny_model("gpt2", n_positions=64))
    works = [measurement.work for measurement in calibrate(model, max_tokens=512, repeats=1).measurements]
    assert max(work.num_tokens for work in works) > 64


@pytest.mark.parametrize("limits", [{"max_tokens": 255}, {"repeats": 0}])
def test_limits_are_checked(limits):
    with pytest.raises(InputError, match="max_tokens of at least 256 and repeats of at least 1"):
        calibrate(attach(tiny_model("llama")), **limits)
