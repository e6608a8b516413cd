"""`kvpref profile time` end to end on a tiny model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kvpref.cli.profile_time import time
from kvpref.errors import InputError


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(rich_markup_mode="rich")
    app.command()(time)
    return app


@pytest.fixture
def arguments(config_file: Path, tokenizer_dir: Path, pairs_file: Path) -> list[str]:
    return [
        *map(str, (config_file, pairs_file)),
        "--tokenizer",
        str(tokenizer_dir),
        "--batch-size",
        "4",
        "--steps",
        "1",
    ]


def test_it_writes_times_and_a_trace(app: typer.Typer, arguments: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = CliRunner().invoke(app, [*arguments, "--max-tokens", "60", "--output", str(output), "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed == json.loads((output / "time.json").read_text())
    assert printed["settings"]["mode"] == "two_pass"
    # 18 prompt words and answers of two words and EOS; a budget of 60 takes two pairs of 24 unique tokens.
    assert printed["facts"] == {"num_micro_batches": 2, "num_sequences": 8, "total_tokens": 168, "unique_tokens": 96}
    entries = printed["entries"]
    assert sum(entry["ms"] for entry in entries) == pytest.approx(printed["step_ms"])
    assert {"pass 0", "pass 1", "lm head", "loss", "optimizer", "data", "other"} == {e["stage"] for e in entries}
    names = {event.get("name") for event in json.loads((output / "trace.json").read_text())["traceEvents"]}
    assert {"kvpref: pass 0", "kvpref: attention cross", "kvpref: data"} <= names
    for shown in ("attention cross", "backward", "share", "without the profiler"):
        assert shown in " ".join(result.stdout.split())


def test_the_bounded_schedule_recomputes(app: typer.Typer, arguments: list[str]) -> None:
    options = ["--schedule", "bounded", "--max-tokens-per-chunk", "24", "--loss", "sft", "--json"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed["settings"]["max_tokens_per_chunk"] == 24
    recomputed = [entry for entry in printed["entries"] if entry["phase"] == "recompute"]
    assert sum(entry["ms"] for entry in recomputed) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1; got 0"),
        (["--mode", "three_pass"], "--mode: expected one of two_pass, one_pass, packed, padded; got 'three_pass'"),
        (["--mode", "packed", "--schedule", "bounded"], "goes with mode 'two_pass'"),
        (["--max-tokens-per-chunk", "8"], "goes with schedule 'bounded'"),
        (["--loss", "nonsense"], "unknown loss 'nonsense'"),
        (["--max-tokens", "10"], "the group alone takes 24 tokens"),
    ],
)
def test_bad_input_is_refused(app: typer.Typer, arguments: list[str], options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, [*arguments, *options])
    assert isinstance(result.exception, InputError), result.output
    assert message in str(result.exception)


def test_help_has_an_example(app: typer.Typer) -> None:
    assert "Example: kvpref profile time" in " ".join(CliRunner().invoke(app, ["--help"]).stdout.split())
