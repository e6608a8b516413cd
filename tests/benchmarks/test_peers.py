"""The comparison with peers: it times only what computes the same, and counts what really runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import kvpref
from kvpref.data.reading.tokenization import load_tokenizer
from kvpref.plan.flops import Flops, count_work

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # benchmarks are scripts, not part of the package

from one_row import split_pair  # noqa: E402
from peers import PEERS  # noqa: E402
from peers.comparison import Side, Timing, compare  # noqa: E402
from peers.interface import DisagreementError, Peer, Runner, StepWork  # noqa: E402
from peers.made_up import MODEL_SETTINGS, made_up_task  # noqa: E402
from peers.ours import KvprefLoop  # noqa: E402
from peers.task import Task, make_task  # noqa: E402
from peers.trainer_steps import trainer_steps  # noqa: E402
from peers.trl_dpo import check_tokens  # noqa: E402

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Two steps of two made-up pairs."""
    return made_up_task(tmp_path).in_batches("random", num_steps=2, pairs_per_step=2)


class LoopPeer(Peer):
    """A peer that is kvpref's own loop, or a subclass that gets something wrong."""

    name = "loop"
    batching = "random"
    description = "for tests"

    def __init__(self, loop: type[KvprefLoop] = KvprefLoop, reason: str | None = None) -> None:
        self.loop, self.reason = loop, reason

    def missing(self) -> str | None:
        return self.reason

    def runner(self, task: Task) -> Runner:
        return self.loop(task)

    def opponent(self, task: Task) -> Runner:
        return KvprefLoop(task)


class Untimed(KvprefLoop):
    def steps(self) -> Iterator[float]:
        raise AssertionError("a peer whose numbers are wrong must not train")


class WrongLogps(Untimed):
    def sequence_logps(self, groups: Any) -> torch.Tensor:
        return super().sequence_logps(groups) * (1 + 1e-4)


class WrongGradient(Untimed):
    """The right log-probs and loss, and a gradient that is only half there."""

    def sequence_logps(self, groups: Any) -> torch.Tensor:
        logps = super().sequence_logps(groups)
        return logps / 2 + logps.detach() / 2


class WrongUpdate(KvprefLoop):
    """Right on the first batch, then trains with another learning rate."""

    def steps(self) -> Iterator[float]:
        self.task = Task(**{**self.task.__dict__, "learning_rate": 0.1})
        return super().steps()


class Broken(KvprefLoop):
    def sequence_logps(self, groups: Any) -> torch.Tensor:
        raise AttributeError("renamed in this version")


@pytest.mark.parametrize(
    ("peer", "verdict", "reason"),
    [
        (LoopPeer(WrongLogps), "refused", "logps differ by 1.0"),
        (LoopPeer(WrongGradient), "refused", "gradient differ by 5.0"),
        (LoopPeer(WrongUpdate), "refused", "losses of step 2 differ"),
        (LoopPeer(Broken), "cannot run", "AttributeError: renamed in this version"),
        (LoopPeer(Untimed, reason="not installed"), "cannot run", "not installed"),
    ],
    ids=["logps", "gradient", "update", "broken", "missing"],
)
def test_only_what_computes_the_same_is_timed(task: Task, peer: Peer, verdict: str, reason: str) -> None:
    comparison = compare(peer, task, num_rounds=1, progress=lambda line: None)
    assert comparison.verdict == verdict
    assert reason in str(comparison.reason)
    assert comparison.timing is None


def test_the_same_twice_is_timed_in_every_round(task: Task) -> None:
    comparison = compare(LoopPeer(), task, num_rounds=2, progress=lambda line: None)
    assert comparison.verdict == "timed"
    assert comparison.loss_difference == 0
    timing = comparison.timing
    assert timing is not None
    assert timing.ideal == timing.total_ideal == 1
    for side in (timing.ours, timing.theirs):
        assert [len(steps) for steps in side.seconds] == [2, 2]
        assert side.losses[0] == pytest.approx(0.693147, abs=1e-6)  # ln 2: the policy starts as the reference
        assert side.losses[1] != side.losses[0]


def _runners(task: Task) -> Iterator[tuple[str, Runner]]:
    for peers in PEERS.values():
        for peer in peers:
            if peer.missing() is None:
                yield peer.name, peer.runner(task)


def _record_rows(seen: dict[str, int], what: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    seen[what] = args[0].numel() // args[0].shape[-1]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_counted_tokens_and_head_rows_are_those_that_run(task: Task) -> None:
    for name, runner in _runners(task):
        model = runner.trainer.model if hasattr(runner, "trainer") else runner.model
        seen: dict[str, int] = {}
        counted = {"tokens": model.model.layers[0].mlp, "head_rows": model.lm_head}
        for what, module in counted.items():
            module.register_forward_pre_hook(partial(_record_rows, seen, what))
        runner.first_batch()
        work = runner.work()[0]
        assert seen["tokens"] == work.num_tokens, name
        # TRL's fused head and kvpref's do not call the module.
        assert seen.get("head_rows", work.num_head_rows) == work.num_head_rows, name


@needs_trl
def test_trl_counts_padded_rows_and_the_recomputed_forward(task: Task) -> None:
    best, default = (peer.runner(task).work()[1] for peer in PEERS["trl"])
    padded = count_work(kvpref.collate(task.step_groups(1)).plan("padded"))
    assert best.num_tokens == padded.num_tokens
    assert best.num_head_rows == padded.num_tokens - 4  # the last position of each of four rows predicts nothing
    assert default.flops.linear * 3 == best.flops.linear * 4
    assert default.flops.attention * 7 == best.flops.attention * 9
    assert default.flops.head == best.flops.head


def _rows(task: Task) -> list[dict[str, list[int]]]:
    """The task's pairs as TRL holds them."""
    pairs = [split_pair(group) for step in range(len(task.batches)) for group in task.step_groups(step)]
    return [{"prompt_ids": prompt, "chosen_ids": first, "rejected_ids": second} for prompt, (first, second) in pairs]


@pytest.mark.parametrize("change", ["token", "boundary", "dropped"])
def test_other_tokens_are_refused(task: Task, change: str) -> None:
    rows = _rows(task)
    check_tokens(rows, task)
    if change == "token":
        rows[2]["rejected_ids"][0] += 1
    elif change == "boundary":
        rows[2]["chosen_ids"].insert(0, rows[2]["prompt_ids"].pop())
    else:
        rows.pop()
    with pytest.raises(DisagreementError):
        check_tokens(rows, task)


@needs_trl
def test_trl_makes_the_same_tokens_of_real_pairs(tmp_path: Path, shared_dir: Path) -> None:
    settings = {**MODEL_SETTINGS, "vocab_size": 50432, "eos_token_id": 0, "max_position_embeddings": 2048}
    tokenizer = load_tokenizer(str(shared_dir / "tokenizers" / "gpt_neox_20b"))
    pairs = (shared_dir / "data" / "hh_harmless_pairs.jsonl").read_text().splitlines()[:6]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(pairs) + "\n")
    task = make_task(data, tokenizer, settings, work_dir=tmp_path)
    PEERS["trl"][0].runner(task.in_batches("group_by_length", num_steps=3, pairs_per_step=2))  # raises if they differ


def test_batches_are_of_different_pairs_and_sorted_ones_are_alike(tmp_path: Path) -> None:
    task = made_up_task(tmp_path, num_pairs=240)
    spreads = {}
    for batching in ("random", "group_by_length"):
        batches = task.in_batches(batching, num_steps=8, pairs_per_step=4).batches
        assert len(set(sum(batches, ()))) == 32
        assert batches == task.in_batches(batching, num_steps=8, pairs_per_step=4).batches
        lengths = [[task.groups.lengths[index].max_sequence_tokens for index in batch] for batch in batches]
        spreads[batching] = sum(max(batch) - min(batch) for batch in lengths)
    assert spreads["group_by_length"] < spreads["random"] / 2
    with pytest.raises(ValueError, match="need 244 pairs; the data has 240"):
        task.in_batches("random", num_steps=61, pairs_per_step=4)


def test_an_error_of_the_trainer_reaches_the_reader() -> None:
    class Trainer:
        def add_callback(self, callback: Any) -> None: ...

        def training_step(self) -> None: ...

        def train(self) -> None:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        next(trainer_steps(Trainer(), []))  # type: ignore[arg-type]


def test_ratios_leave_the_warm_up_out() -> None:
    def side(seconds: list[list[float]], flops: list[int]) -> Side:
        work = [StepWork(num_tokens=1, num_head_rows=1, flops=Flops(value, 0, 0)) for value in flops]
        return Side(
            seconds=seconds,
            system_seconds=[[0.5] * 3] * 2,
            optimizer_seconds=[[0.1] * 3] * 2,
            precompute_seconds=[None, None],
            losses=[],
            work=work,
        )

    ours = side([[50.0, 1.0, 2.0], [50.0, 1.0, 1.0]], [9, 10, 20])
    timing = Timing(ours=ours, theirs=side([[9.0, 3.0, 4.0], [9.0, 4.0, 5.0]], [9, 40, 100]))
    assert timing.speedup == 3.5  # of 3, 2, 4, 5
    assert timing.ideal == 4.5  # of 4, 5
    assert timing.total_speedup == pytest.approx(16 / 5)
    assert timing.total_ideal == pytest.approx(140 / 30)
    assert timing.spread(ours) == pytest.approx((0 + 1 / 1.5) / 2)
    assert timing.system_share(ours) == pytest.approx(2 / 5)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """benchmarks/peers.py; the package of that name is another module."""
    spec = importlib.util.spec_from_file_location("peers_script", BENCHMARKS / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dry_run(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "peers.json"
    script.main(["--dry-run", "--json", "--rounds", "1", "--output", str(output)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(output.read_text())
    assert {"python", "kvpref", "torch", "transformers", "trl", "prefix-grouper"} == set(result["versions"])
    assert result["machine"]["threads"] == 1
    assert [peer["name"] for peer in result["peers"]] == [peer.name for peers in PEERS.values() for peer in peers]
    by_name = {peer["name"]: peer for peer in result["peers"]}
    for peer in by_name.values():
        assert peer["verdict"] in {"timed", "compared", "cannot run"}, peer
        if peer["verdict"] == "timed":
            _check_timing(peer)
    # torch has no flex_attention backward on the CPU, but its log-probs can be compared.
    assert "backward" in by_name["flex_attention"]["reason"]
    assert by_name["flex_attention"]["first_batch_relative_differences"]["logps"] <= 1e-5
    if importlib.util.find_spec("trl") is not None:
        assert by_name["trl_best"]["verdict"] == by_name["trl_default"]["verdict"] == "timed"
        assert by_name["trl_best"]["timing"]["ideal"] > 1  # kvpref never computes more than padded rows
    if importlib.util.find_spec("matplotlib") is not None and any(p["verdict"] == "timed" for p in by_name.values()):
        assert output.with_suffix(".png").stat().st_size > 0


def _check_timing(peer: dict[str, Any]) -> None:
    timing = peer["timing"]
    ours, theirs = timing["kvpref"], timing["peer"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)  # LOSS_TOLERANCE, with its reason
    assert peer["first_batch_relative_differences"]["gradient"] <= 1e-4
    flops = [sum(side["steps"][1]["flops"].values()) for side in (ours, theirs)]
    assert timing["ideal"] == pytest.approx(flops[1] / flops[0])
    assert timing["efficiency"] == pytest.approx(timing["speedup"] / timing["ideal"])
    assert timing["speedup"] == pytest.approx(theirs["step_seconds"][0][1] / ours["step_seconds"][0][1])


def test_missing_data_is_bad_usage(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.parse(["--data", str(tmp_path / "none.jsonl")])
    assert stopped.value.code == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_peer_and_setting_choose(script: ModuleType) -> None:
    assert [peer.name for peer in script.selected("trl", "best")] == ["trl_best"]
    assert [peer.name for peer in script.selected("all", "default")] == [
        "trl_default",
        "prefix_grouper",
        "flex_attention",
    ]
