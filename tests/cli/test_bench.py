"""`kvpref bench` end to end on a tiny model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from command_line_in_process import fail

from kvpref import LossOutput, RunError
from kvpref.cli.bench import bench
from kvpref.profiling import steps

MODES = ["two_pass", "one_pass", "packed", "padded"]


def test_it_reports_every_mode(
    tmp_path: Path, kvpref_command: Run, config_file: Path, tokenizer_dir: Path, pairs_file: Path
) -> None:
    pytest.importorskip("matplotlib")
    done = kvpref_command(
        *("bench", config_file, pairs_file, "--tokenizer", tokenizer_dir, "--batch-size", 6, "--max-tokens", 60),
        *("--repeats", 2, "--output", tmp_path / "out", "--json"),
    )
    assert done.returncode == 0, done.stderr
    # Nothing of PyTorch's profiler and allocator, no bars.
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["checking"] * 4 + ["wrote"]
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed == json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    (comparison,) = printed["comparisons"]
    results = {result["name"]: result for result in comparison["results"]}
    assert list(results) == MODES
    assert all(len(result["rounds_ms"]) == 2 for result in results.values())
    # 18 prompt words and answers of two words and EOS; a budget of 60 takes two pairs of 24 unique tokens, one of 42.
    # Rows 0 and 20 are the same pair, and what is the same goes into one micro-batch.
    assert results["two_pass"]["facts"]["unique_tokens"] == 5 * 24
    assert results["packed"]["facts"]["total_tokens"] == 6 * 42
    assert results["packed"]["facts"]["num_micro_batches"] == 6
    assert results["two_pass"]["facts"]["num_micro_batches"] == 3
    assert results["two_pass"]["ideal"] > 1
    peaks = {mode: result["peak_bytes"] for mode, result in results.items()}
    # Cut into twice as many micro-batches, packed holds less at a time than one_pass, which keeps both levels' rows.
    assert peaks["packed"] < peaks["one_pass"]
    assert "MiB" in done.stdout
    outcomes = printed["settings"]["outcomes"]
    # float32, the same sums in another order
    assert all(outcomes[mode]["loss"] == pytest.approx(outcomes["packed"]["loss"], abs=1e-5) for mode in MODES)


@pytest.mark.full
def test_the_baseline_is_added_and_the_optimizer_left_out(
    kvpref_command: Run, trained_dir: Path, pairs_file: Path
) -> None:
    arguments = (
        "--modes",
        "two_pass",
        "--batch-size",
        2,
        "--repeats",
        1,
        "--loss",
        "sft",
        "--no-time-optimizer",
        "--json",
    )
    done = kvpref_command("bench", trained_dir, pairs_file, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "checking two_pass\nchecking packed\n"  # nor a bar for the weights that are loaded
    printed = json.loads(done.stdout.splitlines()[-1])
    assert [result["name"] for result in printed["comparisons"][0]["results"]] == ["two_pass", "packed"]
    assert printed["settings"]["optimizer"] is None
    # sft runs the chosen answers only, which leaves nothing to share inside a pair
    assert printed["comparisons"][0]["results"][0]["facts"]["num_sequences"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--modes", "two_pass,three_pass"), "unknown mode 'three_pass'; choose from: two_pass, one_pass"),
        (("--modes", ""), "unknown mode ''"),
        (("--batch-size", 0), "--batch-size must be at least 1; got 0"),
        (("--loss", "nonsense"), "unknown loss 'nonsense'"),
        (("--max-tokens", 10), "the group alone takes 24 tokens"),
        (("--dtype", "int3"), "--dtype: expected one of float32, bfloat16, float16, auto; got 'int3'"),
    ],
)
def test_bad_input_exits_with_2(
    arguments: tuple[object, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    config_file: Path,
    tokenizer_dir: Path,
    pairs_file: Path,
) -> None:
    assert message in fail(capsys, "bench", config_file, pairs_file, "--tokenizer", tokenizer_dir, *arguments)


def test_groups_that_the_loss_cannot_take_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config_file: Path, tokenizer_dir: Path
) -> None:
    data = tmp_path / "three.jsonl"
    data.write_text('{"prompt": "one two", "responses": [" one", " two", " three"], "scores": [1, 2, 3]}\n')
    error = fail(capsys, "bench", config_file, data, "--tokenizer", tokenizer_dir)
    assert "three.jsonl:1: a pairwise loss needs exactly 2 responses" in error


def test_a_mode_that_differs_fails_the_run_after_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config_file: Path, tokenizer_dir: Path, pairs_file: Path
) -> None:
    real = steps.forward_backward

    def broken(model: Any, batch: Any, loss: Any, options: Any, **kwargs: Any) -> LossOutput:
        output = real(model, batch, loss, options, **kwargs)
        return output._replace(loss=output.loss * 2) if options.mode == "padded" else output

    monkeypatch.setattr(steps, "forward_backward", broken)
    with pytest.raises(RunError, match="not timed: padded"):
        bench(str(config_file), [str(pairs_file)], str(tokenizer_dir), batch_size=2, repeats=1, output=tmp_path)
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [result["name"] for result in report["comparisons"][0]["results"]] == ["two_pass", "one_pass", "packed"]
    assert list(report["skipped"]) == ["padded"]


def test_help_has_an_example(kvpref_command: Run) -> None:
    done = kvpref_command("bench", "--help")
    assert done.returncode == 0
    assert "Example: kvpref bench" in done.stdout
