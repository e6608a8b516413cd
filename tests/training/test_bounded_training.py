"""The trainer with the bounded schedule: the same training, whatever is chunked, shared, scored or repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import pairwise
from preference_runs import VOCAB_SIZE, make_args, make_groups, make_model

import kvpref
from kvpref.training import step_runner

# float64 model: only the order of sums differs between two ways to one gradient.
TOLERANCE = 1e-10
FEW_SHOT = [(7 * index + 3) % VOCAB_SIZE for index in range(40)]


def few_shot_groups(num_groups: int = 11) -> list[kvpref.Group]:
    """Groups whose prompts all begin alike."""
    return [
        kvpref.Group(
            [
                kvpref.Sequence((*FEW_SHOT, *item.input_ids), (*[False] * len(FEW_SHOT), *item.scored))
                for item in group.sequences
            ],
            labels=group.labels,
            id=group.id,
        )
        for group in make_groups(num_groups)
    ]


def train(output: Path, **overrides: Any) -> kvpref.PreferenceTrainer:
    args = make_args(str(output), **overrides)
    trainer = kvpref.PreferenceTrainer(make_model(), args, train_dataset=few_shot_groups())
    trainer.train()
    return trainer


def weights(trainer: kvpref.PreferenceTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def assert_trained_alike(found: kvpref.PreferenceTrainer, expected: kvpref.PreferenceTrainer) -> None:
    start = torch.cat([parameter.detach().flatten() for parameter in make_model().parameters()])
    update = weights(expected) - start
    assert update.norm() > 1e-2, "training must have moved the weights"
    assert (weights(found) - weights(expected)).norm() / update.norm() < TOLERANCE


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("loss", "shares", "max_tokens_per_chunk"), pairwise(["dpo", "sft"], [True, False], [None, 13])
)
def test_bounded_trains_like_full(tmp_path: Path, loss: str, shares: bool, max_tokens_per_chunk: int | None) -> None:
    expected = train(tmp_path / "full", loss=loss, max_tokens_per_micro_batch=200)
    found = train(
        tmp_path / "bounded",
        loss=loss,
        max_tokens_per_micro_batch=200,
        schedule="bounded",
        max_tokens_per_chunk=max_tokens_per_chunk,
        share_across_micro_batches=shares,
    )
    assert_trained_alike(found, expected)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "overrides",
    [
        {"checkpoint": "all"},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
    ],
    ids=["checkpoint", "gradient_checkpointing", "accumulation"],
)
def test_bounded_with_other_options(tmp_path: Path, overrides: dict[str, Any]) -> None:
    expected = train(tmp_path / "full", max_tokens_per_micro_batch=200, **overrides)
    bounded = {"schedule": "bounded", "max_tokens_per_chunk": 13}
    assert_trained_alike(train(tmp_path / "bounded", max_tokens_per_micro_batch=200, **bounded, **overrides), expected)


def test_shared_prefix_runs_once_per_step(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_tokens_per_micro_batch": 120, "schedule": "bounded", "max_steps": 1}
    shared = train(tmp_path / "shared", **settings)
    apart = train(tmp_path / "apart", share_across_micro_batches=False, **settings)
    full = train(tmp_path / "full", max_tokens_per_micro_batch=120, max_steps=1)
    num_micro_batches = 6  # 120 tokens hold the few-shot prompt and one pair
    assert apart.token_meter.num_forward_tokens == full.token_meter.num_forward_tokens
    saved = apart.token_meter.num_forward_tokens - shared.token_meter.num_forward_tokens
    assert saved == (num_micro_batches - 1) * len(FEW_SHOT)
    assert_trained_alike(shared, apart)


def test_evaluation_and_reference_run_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(name: str, **overrides: Any) -> dict[str, float]:
        args = make_args(str(tmp_path / name), **overrides)
        trainer = kvpref.PreferenceTrainer(
            make_model(), args, train_dataset=few_shot_groups(), eval_dataset=make_groups(5, seed=3)
        )
        trainer.train()
        return trainer.evaluate()

    expected = evaluate("full")
    monkeypatch.setattr("kvpref.engine.schedules.run_mode", None)  # nothing may run as a whole
    found = evaluate("bounded", schedule="bounded", max_tokens_per_chunk=11)
    for name in ("eval_loss", "eval_rewards/margins"):
        assert found[name] == pytest.approx(expected[name], rel=1e-8)


def fail_above(limit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let every step with chunks of more than `limit` tokens run out of memory half-way; returns the chunks tried."""
    tried: list[int] = []
    original = step_runner.forward_backward_step

    def run(model: torch.nn.Module, step: Any, loss: Any, options: Any, **kwargs: Any) -> Any:
        tried.append(options.chunk_tokens)
        outputs = original(model, step, loss, options, **kwargs)
        if options.chunk_tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return outputs

    monkeypatch.setattr(step_runner, "forward_backward_step", run)
    return tried


def test_auto_budget_halves_the_chunk_and_repeats_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = train(tmp_path / "full", max_tokens_per_micro_batch=200)
    tried = fail_above(20, monkeypatch)
    found = train(
        tmp_path / "bounded",
        max_tokens_per_micro_batch=200,
        schedule="bounded",
        max_tokens_per_chunk=64,
        auto_budget=True,
    )
    assert tried == [64, 32, 16, 16], "the smaller chunk stays for the steps that follow"
    assert_trained_alike(found, expected)
    assert "repeating the step with 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        ({"schedule": "bounded", "max_tokens_per_chunk": 64}, "lower max_tokens_per_chunk (now 64"),
        ({}, "use schedule bounded"),
        ({"mode": "packed"}, "use mode two_pass"),
    ],
    ids=["bounded", "full", "packed"],
)
def test_out_of_memory_says_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], advice: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(step_runner, "forward_backward_step", fail)
    monkeypatch.setattr(step_runner, "forward_backward", fail)
    with pytest.raises(kvpref.RunError, match="out of memory") as caught:
        train(tmp_path, max_tokens_per_micro_batch=200, **overrides)
    assert advice in str(caught.value)
    assert "max_tokens_per_micro_batch (now 200)" in str(caught.value)


def test_other_errors_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(step_runner, "forward_backward", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"auto_budget": True}, "auto_budget"),
        ({"auto_budget": True, "schedule": "bounded", "gradient_accumulation_steps": 2}, "auto_budget"),
        ({"schedule": "bounded", "mode": "packed"}, "two_pass"),
        ({"schedule": "endless"}, "full, bounded"),
        ({"checkpoint": "some"}, "none, prefix, all"),
        ({"prefix_cache": "cpu"}, "schedule 'bounded'"),
        ({"max_tokens_per_chunk": 100}, "schedule 'bounded'"),
        ({"schedule": "bounded", "max_tokens_per_chunk": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(kvpref.InputError, match=message):
        make_args(str(tmp_path), **overrides)


@pytest.mark.parametrize("schedule", ["full", "bounded"])
def test_nan_in_one_response_names_its_group(tmp_path: Path, schedule: str) -> None:
    """A token whose embedding is NaN stands in one response only."""
    groups = few_shot_groups()
    bad = VOCAB_SIZE  # no other sequence holds it
    first = groups[4].sequences[0]
    poisoned = kvpref.Sequence((*first.input_ids, bad, 1), (*first.scored, True, True))
    groups[4] = kvpref.Group([poisoned, groups[4].sequences[1]], labels=[True, False], id="made:5")
    model = make_model()
    model.resize_token_embeddings(VOCAB_SIZE + 1)
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = float("nan")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().nan_to_num())
    args = make_args(str(tmp_path), loss="sft", schedule=schedule, per_device_train_batch_size=11, max_steps=1)
    trainer = kvpref.PreferenceTrainer(model, args, train_dataset=groups)
    before = weights(trainer).nan_to_num().clone()
    with pytest.raises(kvpref.RunError, match=r"loss is nan at optimizer step 1: the log-probs of made:5 are not"):
        trainer.train()
    assert torch.equal(weights(trainer).nan_to_num(), before)


@pytest.mark.parametrize("schedule", ["full", "bounded"])
def test_log_lines_tell_memory(tmp_path: Path, schedule: str) -> None:
    trainer = train(tmp_path, schedule=schedule, max_tokens_per_micro_batch=None, per_device_train_batch_size=11)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "prefix_cache_bytes" in line]
    assert len(logged) == trainer.state.global_step
    config = trainer.model.config
    batch = kvpref.collate(few_shot_groups())
    num_prefix_tokens = sum(
        len(segment)
        for index, segment in enumerate(batch.tree.segments)
        if any(other.parent == index for other in batch.tree.segments)
    )
    per_token = 2 * config.n_layer * config.n_embd * 8
    if schedule == "full":  # every pass but the last keeps all of its rows
        num_prefix_tokens = sum(item.input_ids.numel() for item in batch.plan("two_pass").passes[:-1])
    assert {line["prefix_cache_bytes"] for line in logged} == {per_token * num_prefix_tokens}
    assert all(line["peak_memory_bytes"] > per_token for line in logged)
