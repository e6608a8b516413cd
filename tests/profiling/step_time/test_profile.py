"""Where time goes: made-up event trees with known sums, and real steps of a tiny model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from preference_runs import make_groups, make_model

import kvpref
from kvpref.engine.options import EngineOptions
from kvpref.losses import make_loss
from kvpref.profiling.provenance import Provenance
from kvpref.profiling.step_time.profile import NODE, PARTS, Place, attribute
from kvpref.profiling.step_time.report import TimeProfile, TimeReport, time_table
from kvpref.profiling.step_time.step import TimedStep, profile_time


@dataclass
class MadeEvent:
    name: str
    own_us: float = 0.0
    cpu_children: list[MadeEvent] = field(default_factory=list)
    sequence_nr: int = -1


def region(name: str, *children: MadeEvent, own_us: float = 0.0) -> MadeEvent:
    return MadeEvent(f"kvpref: {name}", own_us, list(children))


def node(name: str, number: int, *children: MadeEvent, own_us: float = 0.0) -> MadeEvent:
    return MadeEvent(NODE + name, own_us, list(children), number)


def times(roots: list[MadeEvent], num_steps: int = 1) -> dict[tuple[str, str, str], float]:
    entries = attribute(roots, lambda event: event.own_us, num_steps)
    return {(e.place.stage, e.place.phase, e.place.part): e.ms * 1000 for e in entries}


def test_forward_operators_count_for_their_pass_and_part() -> None:
    layer = [
        MadeEvent("aten::linear", 1, [MadeEvent("aten::t", 2), MadeEvent("aten::addmm", 4)]),
        MadeEvent(
            "kvpref::cascade_forward",
            8,
            [
                region("attention self", MadeEvent("aten::bmm", 16)),
                region("attention cross", own_us=32),
                region("attention merge", own_us=64),
            ],
        ),
        MadeEvent("aten::silu", 128),
    ]
    root = region("step", region("pass 0", *layer, own_us=256), MadeEvent("aten::embedding", 512), own_us=1024)
    assert times([root]) == {
        ("pass 0", "forward", "linear"): 7,
        ("pass 0", "forward", "attention self"): 16,
        ("pass 0", "forward", "attention cross"): 32,
        ("pass 0", "forward", "attention merge"): 72,
        ("pass 0", "forward", "other"): 384,
        ("other", "step", "other"): 1536,
    }
    assert times([root], num_steps=2)[("pass 0", "forward", "linear")] == 3.5


def test_backward_nodes_count_for_the_pass_of_their_forward_operator() -> None:
    forward = [
        # An operator that makes no node has the number of the next that does, here in another pass.
        region("pass 0", MadeEvent("aten::mm", sequence_nr=3), MadeEvent("aten::detach", sequence_nr=4)),
        region("pass 1", MadeEvent("aten::silu", sequence_nr=4)),
        region("lm head", MadeEvent("_TokenLogprobs", sequence_nr=5)),
        region("loss", MadeEvent("aten::mean", sequence_nr=6)),
    ]
    backward = [
        MadeEvent("aten::mul", 1, sequence_nr=7),
        node("MeanBackward0", 6, own_us=2),
        node("_TokenLogprobsBackward", 5, MadeEvent("aten::mm", 4)),
        node("SiluBackward0", 4, own_us=8),
        node("MmBackward0", 3, MadeEvent("MmBackward0", 16, [MadeEvent("aten::t", 32)], 3)),
        node("torch::autograd::AccumulateGrad", -1, own_us=64),
    ]
    expected = {
        ("pass 0", "backward", "linear"): 48,
        ("pass 1", "backward", "other"): 8,
        ("lm head", "backward", "lm head"): 4,
        ("loss", "backward", "loss"): 2,
        ("other", "backward", "other"): 65,
    }
    assert times([region("step", *forward, region("backward", *backward))]) == expected
    # On CUDA nodes run in a thread of their own, where they have no parent.
    alone = [region("step", *forward, region("backward", backward[0])), *backward[1:]]
    assert times(alone) == expected


def test_attention_s_backward_is_told_apart_by_its_ranges() -> None:
    root = region(
        "step",
        region("pass 1", MadeEvent("GeneratedBackwardFor_kvpref_cascade_forward_default", sequence_nr=1)),
        region(
            "backward",
            node(
                "GeneratedBackwardFor_kvpref_cascade_forward_defaultBackward",
                1,
                MadeEvent("kvpref::cascade_backward", 4, [region("attention cross", MadeEvent("aten::mm", 2))]),
                own_us=1,
            ),
        ),
    )
    assert times([root]) == {
        ("pass 1", "backward", "attention cross"): 2,
        ("pass 1", "backward", "attention merge"): 5,
    }


def test_chunks_the_optimizer_and_data() -> None:
    root = region(
        "step",
        MadeEvent("Optimizer.zero_grad#AdamW.zero_grad", 1),
        region("data", MadeEvent("aten::cat", 2)),
        region("pass 1", region("lm head", MadeEvent("aten::mm", 4))),
        region("recompute pass 1", MadeEvent("aten::mm", 8, sequence_nr=1), region("lm head", own_us=16)),
        region("backward pass 1", node("MmBackward0", 1, own_us=32), own_us=64),
        MadeEvent("Optimizer.step#AdamW.step", 128, [MadeEvent("aten::_fused_adamw_", 256)]),
    )
    assert times([root]) == {
        ("pass 1", "recompute", "linear"): 8,
        ("pass 1", "backward", "linear"): 32,
        ("pass 1", "backward", "other"): 64,
        ("lm head", "forward", "lm head"): 4,
        ("lm head", "recompute", "lm head"): 16,
        ("optimizer", "step", "optimizer"): 385,
        ("data", "step", "data"): 2,
    }


def test_transformers_own_attention_and_what_ran_outside_steps() -> None:
    attention = MadeEvent("aten::scaled_dot_product_attention", 1, [MadeEvent("aten::bmm", 2)], sequence_nr=1)
    roots = [
        MadeEvent("aten::mm", 100),
        region("step", region("pass 0", attention), node("ScaledDotProductFlashAttentionForCpuBackward0", 1, own_us=4)),
    ]
    assert times(roots)[("pass 0", "forward", "attention self")] == 3
    assert sum(times(roots).values()) == 7


OPTIONS = {
    "full": EngineOptions(),
    "bounded": EngineOptions(schedule="bounded", max_tokens_per_chunk=64),
    "one_pass": EngineOptions(mode="one_pass"),
    "packed": EngineOptions(mode="packed"),
    "padded": EngineOptions(mode="padded"),
}


def profiled(options: EngineOptions, trace: Path | None = None) -> tuple[TimedStep, TimeProfile]:
    model = kvpref.attach(make_model()).train()
    groups = make_groups(6)
    optimizer = torch.optim.AdamW(model.parameters())
    step = TimedStep(model, make_loss("dpo"), optimizer, [groups[:3], groups[3:]], options)
    return step, profile_time(step, 2, trace)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_parts_of_real_steps_add_up_to_them(name: str) -> None:
    _, profile = profiled(OPTIONS[name])
    # The profiler's clock ticks in nanoseconds; sums of some thousand differences of doubles.
    assert profile.total_ms == pytest.approx(profile.profiled_ms, rel=1e-6)
    assert all(entry.ms > 0 for entry in profile.entries)
    assert sum(profile.ms(part=part) for part in PARTS) == pytest.approx(profile.total_ms)
    passes = {"pass 0", "pass 1"} if OPTIONS[name].mode == "two_pass" else {"pass 0"}
    places = {entry.place for entry in profile.entries}
    for stage in passes:
        for phase in ("forward", "backward"):
            for part in ("attention self", "linear", "other"):
                assert Place(stage=stage, phase=phase, part=part) in places
    assert passes == {place.stage for place in places if place.stage.startswith("pass")}
    assert {"lm head", "loss", "optimizer", "data"} <= {place.part for place in places}
    assert (profile.ms(part="attention cross") > 0) == (OPTIONS[name].mode in ("two_pass", "one_pass"))
    assert (profile.ms(phase="recompute") > 0) == (name == "bounded")


def test_the_trace_holds_the_ranges_and_the_report_the_sums(tmp_path: Path) -> None:
    step, profile = profiled(OPTIONS["full"], tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("kvpref: step") == 2
    # Two micro-batches of two steps; two layers of which the second pass has a cross block, forward and backward.
    assert names.count("kvpref: pass 1") == 4
    assert names.count("kvpref: attention cross") == 4 * 2 * 2
    assert names.count("kvpref: attention self") == 4 * 2 * 2 * 2
    # Only in the second pass there is something to merge.
    assert names.count("kvpref: attention cross") == names.count("kvpref: attention merge") == 4 * 1 * 2 * 2
    report = TimeReport(
        title="made up",
        provenance=Provenance.collect(torch.device("cpu")),
        settings={"mode": "two_pass"},
        facts=step.facts,
        profile=profile,
    )
    report.write(tmp_path / "out" / "time.json")
    written = json.loads((tmp_path / "out" / "time.json").read_text())
    assert written["step_ms"] == pytest.approx(sum(written["parts_ms"].values()))
    assert written["facts"]["num_micro_batches"] == 2
    columns = {column.header: list(column.cells) for column in time_table(report).columns}
    assert columns["where"][-1] == "all"
    # Cells are rounded to hundredths.
    assert sum(map(float, columns["total"][:-1])) == pytest.approx(float(columns["total"][-1]), abs=0.2)


@pytest.mark.full
def test_the_profiled_step_trains_as_the_engine_does() -> None:
    step, _ = profiled(OPTIONS["bounded"])
    full, _ = profiled(OPTIONS["full"])
    for chunked, whole in zip(step.model.parameters(), full.model.parameters(), strict=True):
        # Five steps of AdamW in float64, gradients summed in another order.
        torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-8)
