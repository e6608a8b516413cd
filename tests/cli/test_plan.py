"""`kvpref plan`, also for models that no machine of ours could hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import environment
from command_line_in_process import fail, run
from vision_files import save_model, write_pairs

from kvpref.plan.modes import MODES

CONFIGS = Path(__file__).parent.parent / "configs"
LENGTHS = ("--prompt-tokens", 4096, "--response-tokens", 512, "--num-responses", 16)
GIB = 2**30
# The command in a process of its own, and the most memory that it took.
PROGRAM = """
import resource, sys, typer
from kvpref.cli.plan import plan
app = typer.Typer()
app.command()(plan)
app(sys.argv[1:], standalone_mode=False)
print(f"peak KiB: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}", file=sys.stderr)
"""


def run_plan(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment(), check=False)


def plan_of(*arguments: object) -> dict[str, Any]:
    done = run_plan(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    peak_kib = int(done.stderr.rsplit("peak KiB: ", 1)[1])
    assert peak_kib * 1024 < 4 * GIB
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["by_name"] = {variant["name"]: variant for variant in result["variants"]}
    return result


def one_group_bytes(plan: dict[str, Any]) -> dict[str, int]:
    return {name: variant["one_group"]["total_bytes"] for name, variant in plan["by_name"].items()}


@pytest.mark.full
def test_an_8b_model_with_adapters_fits_in_the_bounded_schedule_only() -> None:
    pytest.importorskip("peft")
    plan = plan_of(CONFIGS / "llama_3_1_8b.json", *LENGTHS, "--lora-r", 16, "--dtype", "bfloat16")
    needed = one_group_bytes(plan)
    assert needed["bounded"] < needed["full"] < needed["packed"] < needed["padded"]
    assert {name: variant["fits"] for name, variant in plan["by_name"].items()} == {
        "bounded": True,
        "full": False,
        "packed": False,
        "padded": False,
    }
    bounded = plan["by_name"]["bounded"]
    assert bounded["largest_bytes"] <= plan["budget_bytes"] == 78 * GIB
    assert f"--max-tokens-per-chunk {bounded['max_tokens_per_chunk']}" in bounded["command"]
    # 8.03 billion weights in 16 bits and 42 million adapter weights in 32, with gradients and two moments.
    assert bounded["one_group"]["resident_bytes"] == pytest.approx(8.03e9 * 2 + 4 * 4 * 42e6, rel=0.01)
    assert plan["by_name"]["packed"]["max_responses"] < plan["by_name"]["full"]["max_responses"] < 16
    assert bounded["max_responses"] > 100


@pytest.mark.full
def test_a_70b_model_needs_shards_or_adapters() -> None:
    plan = plan_of(CONFIGS / "llama_3_1_70b.json", *LENGTHS, "--dtype", "bfloat16")
    assert not any(variant["fits"] for variant in plan["variants"])
    resident = plan["by_name"]["full"]["one_group"]["resident_bytes"]
    assert resident == pytest.approx(70.55e9 * 2 * 4, rel=0.01)
    assert any("--lora-r 16" in line for line in plan["advice"])
    assert any("--world-size" in line for line in plan["advice"])


@pytest.mark.full
def test_a_sharded_70b_model_runs_bounded_and_full_gathers_all_of_it() -> None:
    plan = plan_of(CONFIGS / "llama_3_1_70b.json", *LENGTHS, "--num-shards", 16, "--dtype", "bfloat16")
    assert set(plan["by_name"]) == {"bounded", "bounded, kept", "full", "packed", "padded"}
    resident = {name: variant["one_group"]["resident_bytes"] for name, variant in plan["by_name"].items()}
    whole = 70.55e9 * 2
    # A sixteenth of everything, and the layer that is gathered; or weights and gradients whole.
    assert whole * 4 / 16 < resident["bounded"] < 1.5 * whole * 4 / 16
    assert resident["full"] == resident["bounded, kept"] == pytest.approx(whole * 4 / 16 + 2 * whole, rel=0.01)


def small(tmp_path: Path) -> Path:
    """Few layers of the 8B model."""
    config = json.loads((CONFIGS / "llama_3_1_8b.json").read_text())
    path = tmp_path / "small.json"
    path.write_text(json.dumps({**config, "num_hidden_layers": 3, "vocab_size": 4096}))
    return path


def test_packed_grows_with_the_responses_and_bounded_hardly(tmp_path: Path) -> None:
    from kvpref.cli.loading import load_config
    from kvpref.engine.options import EngineOptions
    from kvpref.profiling.prediction.model import TrainingSetup
    from kvpref.profiling.prediction.peak import Predictor
    from kvpref.profiling.prediction.step import GroupShape

    predictor = Predictor(load_config(str(small(tmp_path))), TrainingSetup())

    def added(variant: EngineOptions, num_responses: int) -> int:
        shape = GroupShape(prompt_tokens=512, response_tokens=128, num_responses=num_responses)
        peak = predictor.peak(variant, shape)
        return peak.total_bytes - peak.resident_bytes

    packed, bounded = EngineOptions(mode="packed"), EngineOptions(schedule="bounded", max_tokens_per_chunk=512)
    assert added(packed, 16) > 1.8 * added(packed, 8)
    assert added(bounded, 16) < 1.02 * added(bounded, 8)


@pytest.mark.full
def test_everything_fits_a_small_model(tmp_path: Path) -> None:
    lengths = ("--prompt-tokens", 300, "--response-tokens", 100, "--num-responses", 4)
    checkpoint = ("--dtype", "bfloat16", "--checkpoint", "all")
    plan = plan_of(small(tmp_path), *lengths, "--gpu-memory", "8GiB", "--reserve", "1GiB", *checkpoint)
    assert plan["advice"] == []
    for variant in plan["variants"]:
        assert variant["fits"]
        assert variant["mode"] in MODES
        assert "--checkpoint all" in variant["command"]
        assert variant["largest_bytes"] <= plan["budget_bytes"] == 7 * GIB
    full, packed = plan["by_name"]["full"], plan["by_name"]["packed"]
    assert full["max_tokens_per_micro_batch"] == full["num_groups"] * 700
    assert packed["max_tokens_per_micro_batch"] == packed["num_groups"] * 1600
    assert full["num_groups"] > packed["num_groups"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt-tokens", 8), "give --prompt-tokens, --response-tokens and --num-responses, or --data"),
        ((*LENGTHS, "--gpu-memory", "much"), "expected a size such as 80GiB"),
        ((*LENGTHS, "--gpu-memory", "1GiB"), "leaves nothing"),
        ((*LENGTHS, "--dtype", "fp16"), "unknown dtype 'float16'; choose from: float32, bfloat16"),
        ((*LENGTHS, "--lora-r", 8, "--lora-target-modules", "attention"), "the model has no module 'attention'"),
        ((*LENGTHS, "--num-shards", 0), "at least 1; got 0"),
        ((*LENGTHS, "--shard", "zero4"), "choose from: ddp, zero1, zero2, zero3, fsdp2"),
        ((*LENGTHS, "--world-size", 6, "--sequence-parallel", 4), "must be a divisor of the 6 devices"),
        ((*LENGTHS, "--world-size", 12, "--sequence-parallel", 3), "must be a divisor of them"),
        ((*LENGTHS, "--checkpoint", "some"), "--checkpoint: expected one of none, prefix, all; got 'some'"),
    ],
)
def test_bad_usage_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], message: str
) -> None:
    assert message in fail(capsys, "plan", small(tmp_path), *arguments)


def test_lengths_come_from_data(tmp_path: Path, tokenizer_dir: Path, pairs_file: Path) -> None:
    # Little memory: the more there is, the longer the search for the largest budget that fits.
    memory = ("--gpu-memory", "3GiB", "--reserve", "512MiB", "--dtype", "bfloat16")
    plan = plan_of(small(tmp_path), "--data", pairs_file, "--tokenizer", tokenizer_dir, "--num-responses", 5, *memory)
    # 18 words; two words and the end; the option given wins over the data's pairs.
    assert plan["shape"] == {"prompt_tokens": 18, "response_tokens": 3, "num_responses": 5}


# Where nothing fits, nothing is searched for.
SMALL = ("--gpu-memory", "1MiB", "--reserve", "768KiB", "--device", "cpu", "--json")


def test_ranks_that_share_micro_batches_pad_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ("--prompt-tokens", 40, "--response-tokens", 8, "--num-responses", 2, *SMALL)
    run("plan", small(tmp_path), *lengths, "--world-size", 4, "--sequence-parallel", 2)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [variant["name"] for variant in found["variants"]] == ["bounded", "bounded, kept", "full", "packed"]


@pytest.mark.full
def test_images_are_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model("gemma3", tmp_path)
    lengths = (folder, "--prompt-tokens", 100, "--response-tokens", 8, "--num-responses", 2, *SMALL)
    run("plan", *lengths, "--images", 2, "--image-size", "40x32")
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found["shape"]["num_images"] == 2
    assert 0 < found["shape"]["image_tokens"] < 100
    held = {variant["name"]: variant["one_group"]["bytes_by_category"] for variant in found["variants"]}
    assert held["packed"]["pixel inputs"] == held["padded"]["pixel inputs"] == 2 * held["full"]["pixel inputs"] > 0
    assert "full: of one group's peak, activations vision tower" in out
    assert "a size such as 640x480" in fail(capsys, "plan", *lengths, "--images", 1, "--image-size", "big")


@pytest.mark.full
def test_images_of_data_are_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, pairs = save_model("gemma3", tmp_path / "model"), write_pairs(tmp_path / "data")
    run("plan", folder, "--data", pairs, "--lengths", "p50", *SMALL)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["shape"]["num_images"] == 2
    assert found["shape"]["prompt_tokens"] > found["shape"]["image_tokens"]
