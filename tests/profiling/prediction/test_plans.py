"""Plans made in several processes, against those of one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tiny_models import tiny_config

from kvpref.engine.options import EngineOptions
from kvpref.errors import InputError
from kvpref.profiling.prediction import fit, plans
from kvpref.profiling.prediction.fit import VariantPlan
from kvpref.profiling.prediction.model import TrainingSetup
from kvpref.profiling.prediction.peak import PeakPrediction, Predictor
from kvpref.profiling.prediction.plans import plan_variants
from kvpref.profiling.prediction.step import GroupShape

SHAPE = GroupShape(prompt_tokens=9, response_tokens=5, num_responses=2)
BOUNDED = EngineOptions(schedule="bounded")
VARIANTS = {
    "bounded": BOUNDED,
    "kept": replace(BOUNDED, gather_weights="step", reduce_grads="step"),
    "full": EngineOptions(),
    "packed": EngineOptions(mode="packed"),
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(tiny_config("llama"), TrainingSetup())


def planned(predictor: Predictor, budget_bytes: int = 10**9) -> dict[str, VariantPlan]:
    found = list(plan_variants(VARIANTS, predictor, SHAPE, budget_bytes))
    assert len(found) == len(VARIANTS)
    return {plan.name: plan for plan in found}


def use_cores(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(plans, "_num_cores", lambda: number)


def use_plan(monkeypatch: pytest.MonkeyPatch, plan: Callable[[str], VariantPlan]) -> None:
    monkeypatch.setattr(fit, "plan_variant", lambda name, *_: plan(name))


def made_up(name: str, **changes: Any) -> VariantPlan:
    peak = PeakPrediction(total_bytes=1, bytes_by_category={}, region=None, resident_bytes=1)
    plan = VariantPlan(
        name=name,
        variant=VARIANTS[name],
        one_group=peak,
        num_groups=1,
        largest=peak,
        max_tokens_per_micro_batch=1,
        max_responses=1,
    )
    return replace(plan, **changes)


def test_plans_of_processes_are_those_of_one(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(VARIANTS, "bounded")
    monkeypatch.delitem(VARIANTS, "kept")
    use_cores(monkeypatch, 2)
    side_by_side = planned(predictor, budget_bytes=1)
    assert not predictor._peaks  # none was predicted here
    use_cores(monkeypatch, 1)
    assert side_by_side == planned(predictor, budget_bytes=1)
    one_group = side_by_side["full"].one_group
    assert one_group.total_bytes > one_group.resident_bytes > 0


def test_variants_with_one_trace_share_a_process(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    use_cores(monkeypatch, 3)
    use_plan(monkeypatch, lambda name: made_up(name, max_responses=os.getpid()))
    process = {name: plan.max_responses for name, plan in planned(predictor).items()}
    assert process["bounded"] == process["kept"]
    assert os.getpid() not in process.values()


def test_where_processes_die_this_one_plans(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.getpid()

    def plan(name: str) -> VariantPlan:
        if os.getpid() != own:
            os._exit(1)
        return made_up(name)

    use_cores(monkeypatch, 2)
    use_plan(monkeypatch, plan)
    assert planned(predictor) == {name: made_up(name) for name in VARIANTS}


def test_errors_of_processes_are_raised(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(name: str) -> VariantPlan:
        raise InputError(f"{name} is wrong")

    use_cores(monkeypatch, 2)
    use_plan(monkeypatch, plan)
    with pytest.raises(InputError, match="is wrong"):
        planned(predictor)
