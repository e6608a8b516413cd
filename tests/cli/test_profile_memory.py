"""`kvpref profile memory` end to end on a tiny model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpref import Group, InputError, RunError, Sequence
from kvpref.cli.profile_memory import memory, take_responses
from kvpref.profiling.memory.step import ProfiledStep

VARIANTS = ["full", "bounded", "packed", "padded"]


@pytest.fixture(scope="module")
def scored_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups of eight responses, and one of two that is too small where eight are asked for."""
    path = tmp_path_factory.mktemp("scored") / "groups.jsonl"
    prompt = " ".join(["one two three four five six"] * 4)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    rows = [
        {"prompt": prompt + f" {words[index]}", "responses": [f" {w} {w}" for w in words], "scores": list(range(8))}
        for index in range(5)
    ]
    rows.append({"prompt": prompt, "responses": [" one", " two"], "scores": [1, 0]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_it_reports_peaks_by_responses_and_variant(
    tmp_path: Path, config_file: Path, tokenizer_dir: Path, scored_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    memory(
        *(str(config_file), [str(scored_file)], str(tokenizer_dir)),
        num_responses="8,2",
        batch_size=2,
        max_tokens_per_chunk=16,
        output=tmp_path / "out",
        json_=True,
    )
    captured = capsys.readouterr()
    report = json.loads(captured.out.splitlines()[-1])
    assert report == json.loads((tmp_path / "out" / "memory.json").read_text())
    names = [profile["name"] for profile in report["profiles"]]
    assert names == [f"{variant} N={count}" for count in (2, 8) for variant in VARIANTS]
    profiles = {profile["name"]: profile for profile in report["profiles"]}
    # The same two prompts of 25 words, with 2 or 8 responses of two words and EOS; prompts begin alike.
    assert profiles["packed N=2"]["facts"]["total_tokens"] == 2 * 2 * 28
    assert profiles["packed N=8"]["facts"]["total_tokens"] == 2 * 8 * 28
    assert profiles["packed N=8"]["peak"]["total_bytes"] > 2 * profiles["packed N=2"]["peak"]["total_bytes"]
    for profile in profiles.values():
        assert profile["prefix_bytes"] == profile["prefix_size"]["num_bytes"]
    assert profiles["full N=8"]["prefix_bytes"] > 0
    assert (tmp_path / "out" / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "memory.html").read_text()
    assert "N = 8" in captured.out
    assert "by the formula 2 x 2 layers" in captured.out


def test_whole_groups_and_a_registered_loss(
    config_file: Path, tokenizer_dir: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory(
        *(str(config_file), [str(pairs_file)], str(tokenizer_dir)),
        variants="packed, full,packed",
        batch_size=3,
        max_tokens=60,
        loss="dpo",
        json_=True,
    )
    report = printed(capsys)
    assert [profile["name"] for profile in report["profiles"]] == ["packed", "full"]
    # A pair is 42 tokens, 24 of them unique: the budget takes one, or two.
    assert [profile["facts"]["num_micro_batches"] for profile in report["profiles"]] == [3, 2]
    assert report["settings"]["loss"] == "dpo"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variants": "full,half"}, "unknown variant 'half'; choose from: full, bounded"),
        ({"variants": ","}, "unknown variant"),
        ({"num_responses": "2,many"}, "--num-responses takes whole numbers from 1 on"),
        ({"num_responses": "0"}, "--num-responses takes whole numbers from 1 on"),
        ({"num_responses": "2,9"}, "no group has 9 responses; the largest has 8"),
        ({"batch_size": 0}, "--batch-size must be at least 1; got 0"),
        ({"max_tokens": 0}, "--max-tokens must be at least 1; got 0"),
        ({"max_tokens": 5}, "the group alone takes"),
        ({"max_tokens_per_chunk": 0}, "max_tokens_per_chunk must be at least 1; got 0"),
        ({"loss": "nonsense"}, "unknown loss 'nonsense'; choose from: likelihood, dpo"),
        ({"dtype": "int3"}, "unknown dtype 'int3'"),
    ],
)
def test_bad_input_is_named(
    settings: dict[str, Any], message: str, config_file: Path, tokenizer_dir: Path, scored_file: Path
) -> None:
    with pytest.raises(InputError, match=message):
        memory(str(config_file), [str(scored_file)], str(tokenizer_dir), **settings)


def test_a_run_without_any_profile_fails_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, tokenizer_dir: Path, scored_file: Path
) -> None:
    def out_of_memory(step: ProfiledStep) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(ProfiledStep, "run", out_of_memory)
    with pytest.raises(RunError, match="nothing could be measured: out of device memory: no room"):
        memory(str(config_file), [str(scored_file)], str(tokenizer_dir), variants="full")


def test_responses_are_taken_evenly_with_their_scores_and_labels() -> None:
    sequences = [Sequence.from_prompt_and_response([1], [2 + index]) for index in range(5)]
    group = Group(sequences, scores=[0, 1, 2, 3, 4], labels=[True, False, True, False, True], id="row")
    taken = take_responses(group, 2)
    assert taken.sequences == (sequences[0], sequences[2])
    assert (taken.scores, taken.labels, taken.id) == ((0, 2), (True, True), "row")
    assert take_responses(group, None) is group
