"""The commands that `kvpref plan` prints."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line_in_process import run
from tiny_models import tiny_config

from kvpref.cli.given_data import GivenData
from kvpref.cli.given_settings import Settings
from kvpref.cli.plan import _setup
from kvpref.cli.plan_command import Subject, train_command
from kvpref.cli.plan_report import PlanReport
from kvpref.cli.run_config import RunConfig
from kvpref.cli.setting_types import read_types
from kvpref.cli.training_settings import with_defaults
from kvpref.engine.options import EngineOptions
from kvpref.profiling.prediction.fit import VariantPlan
from kvpref.profiling.prediction.model import TrainingSetup
from kvpref.profiling.prediction.peak import PeakPrediction, Predictor
from kvpref.profiling.prediction.ranks import Ranks
from kvpref.profiling.prediction.step import GroupShape

SETUPS: dict[str, tuple[str, ...]] = {
    "weights": (),
    "an adapter": ("--lora-r", "4", "--lora-target-modules", "q_proj,v_proj"),
    "an adapter on all layers": ("--lora-r", "2", "--dtype", "bfloat16"),
    "pure bf16": ("--dtype", "bfloat16", "--checkpoint", "all"),
    "without autocast": ("--no-bf16", "--optimizer", "sgd", "--prefix-cache", "cpu"),
    "the CPU": ("--device", "cpu", "--data", "my data.jsonl"),
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings that `kvpref train` takes from a command line, in place of a run."""
    found: list[dict[str, Any]] = []

    def record(given: Settings, **others: Any) -> dict[str, Any]:
        found.append({name: item.value for name, item in read_types(given).items()})
        return {}

    monkeypatch.setattr("kvpref.cli.training_run.run_training", record)
    return found


def made_up_plan(name: str, variant: EngineOptions, *others: object) -> VariantPlan:
    """A plan of a variant that fits, without a search for it."""
    chunk = 512 if variant.schedule == "bounded" else None
    peak = PeakPrediction(total_bytes=9, bytes_by_category={}, region=None, resident_bytes=5)
    return VariantPlan(
        name=name,
        variant=replace(variant, max_tokens_per_chunk=chunk),
        one_group=peak,
        num_groups=3,
        largest=peak,
        max_tokens_per_micro_batch=100 + len(name),
        max_responses=4,
    )


def setup_of(run: RunConfig) -> TrainingSetup:
    """What a plan would have to be told of a run on a CUDA device that computes in bf16."""
    training, on_cpu = run.training, run.training.get("use_cpu", False)
    return TrainingSetup(
        dtype=getattr(torch, run.dtype),
        mixed_precision=torch.bfloat16 if training.get("bf16", not on_cpu) else None,
        optimizer=training.get("optim", "adamw"),
        lora_r=run.lora_r,
        lora_target_modules=run.lora_target_modules or "all-linear",
        device_type="cpu" if on_cpu else "cuda",
    )


@pytest.mark.parametrize("arguments", SETUPS.values(), ids=SETUPS)
def test_the_commands_train_what_was_planned(
    arguments: tuple[str, ...], taken: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[PlanReport] = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data.jsonl").touch()
    monkeypatch.setattr(PlanReport, "show", lambda self, title: reports.append(self))
    monkeypatch.setattr("kvpref.cli.plan._lengths_of", lambda *names: ((40, 8, 2), None))
    monkeypatch.setattr("kvpref.profiling.prediction.fit.plan_variant", made_up_plan)
    lengths = () if "--data" in arguments else ("--prompt-tokens", 40, "--response-tokens", 8, "--num-responses", 2)
    config = tmp_path / "config.json"
    config.write_text((Path(__file__).parent.parent / "configs" / "llama_3_1_8b.json").read_text())
    run("plan", config, *lengths, *arguments)
    (report,) = reports
    assert len(report.plans) == 4
    for plan in report.plans:
        command = report.command(plan)
        assert command is not None
        program, name, *printed = shlex.split(command)
        assert (program, name) == ("kvpref", "train")
        run(name, *printed)
        trained = with_defaults(RunConfig.of(taken.pop()))
        assert (trained.model, trained.output) == (str(tmp_path), "OUT")
        assert trained.data == ["my data.jsonl" if "--data" in arguments else "DATA"]
        assert setup_of(trained) == report.setup
        settings = trained.training
        assert settings["max_tokens_per_micro_batch"] == plan.max_tokens_per_micro_batch
        engine = {item.name: settings.get(item.name, item.default) for item in fields(EngineOptions)}
        assert EngineOptions(**engine) == plan.variant


def test_commands_for_random_weights_adapters_and_shards() -> None:
    def command(model: str, ranks: Ranks | None = None, **setup: Any) -> str | None:
        subject = Subject(model=model, data=GivenData.of(["pairs.jsonl"]), tokenizer=None)
        return train_command(subject, TrainingSetup(**setup), EngineOptions(), max_tokens=5, ranks=ranks)

    assert "train pairs.jsonl --model-config small.json --tokenizer TOKENIZER --output OUT" in str(
        command("small.json")
    )
    # An adapter is saved without its base, so random weights are refused.
    assert "kvpref train MODEL pairs.jsonl --output OUT --lora-r 3 " in str(command("small.json", lora_r=3))
    assert "kvpref train llama pairs.jsonl --output OUT " in str(command("llama/config.json"))
    sharded = str(command("llama", Ranks(world_size=4, shard="zero3", sequence_parallel=2)))
    assert sharded.startswith("kvpref train llama pairs.jsonl")
    assert sharded.endswith("--num-processes 4 --accelerate-config zero3 --set sequence_parallel=2")
    machines = str(command("llama", Ranks(world_size=64)))
    assert machines.startswith("torchrun --nnodes 8 --nproc-per-node 8 -m kvpref train llama pairs.jsonl")
    assert machines.endswith("--accelerate-config fsdp2")
    assert command("llama", optimizer="sgd_momentum") is None


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        ({"dtype": torch.bfloat16}, "a step below 1/512 of a weight is rounded away"),
        ({"dtype": torch.bfloat16, "lora_r": 2}, "the frozen weights are in bfloat16, the adapter's in float32"),
        ({"dtype": torch.float32, "lora_r": 2}, "--dtype bfloat16 halves the frozen weights"),
    ],
)
def test_what_the_dtype_means_is_said(setup: dict[str, Any], words: str) -> None:
    subject = Subject(model="llama", data=None, tokenizer=None)
    trained = TrainingSetup(**setup)
    report = PlanReport(
        subject=subject,
        plans=[],
        setup=trained,
        predictor=Predictor(tiny_config("llama"), trained),
        shape=GroupShape(prompt_tokens=1, response_tokens=1, num_responses=1),
        groups_per_rank=1,
        budget_bytes=1,
    )
    assert any(words in note for note in report.notes())


def test_the_default_plans_float32_weights_with_autocast() -> None:
    assert _setup("float32", None, "adamw", None, "all-linear", "cuda") == TrainingSetup(
        dtype=torch.float32, mixed_precision=torch.bfloat16
    )
    assert _setup("float32", None, "adamw", None, "all-linear", "cpu").mixed_precision is None
    assert _setup("bfloat16", None, "adamw", None, "all-linear", "cuda").mixed_precision is None
