"""Figures about trajectories, counted by hand, and what `kvpref data inspect` says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from agent_templates import PLAIN, THINKS, build_agent_tokenizer, conversation, say
from typer.testing import CliRunner

from kvpref.cli import data as data_command
from kvpref.data import load_preferences, summarize_dataset
from kvpref.data.summaries import LengthSummary

SYSTEM = say("system", "x" * 18)


def talk(question: str, *said: str) -> list[dict[str, Any]]:
    turns = [say("user" if index % 2 else "assistant", text) for index, text in enumerate(said)]
    return [SYSTEM, say("user", question), *turns]


def test_figures_of_trajectories_by_hand(write_jsonl: Any) -> None:
    path = write_jsonl(
        {"id": "t", "trajectories": [{"messages": talk("abcd", "one", "b", "left")}, {"messages": talk("abcd", "two")}]}
    )
    statistics = summarize_dataset(load_preferences(path, build_agent_tokenizer(PLAIN)))
    found = statistics.trajectories
    assert found is not None
    # Each message takes its text and two special tokens, what asks for a turn one.
    prompt = (18 + 2) + (4 + 2) + 1
    first, second = prompt + 4, prompt + 4 + 3 + 1 + 5
    assert (found.num_tasks, found.num_trajectories) == (1, 2)
    assert found.turns_per_trajectory == LengthSummary(mean=1.5, p50=1, p90=2, max=2)
    assert found.scored_tokens == 4 + 5 + 4
    assert found.call_tokens == (first + second) + first
    assert found.trajectory_tokens == second + first
    assert found.unique_tokens == prompt + (second - prompt) + 4
    assert found.passes_per_task.max == 2
    assert found.call_saving == found.call_tokens / found.unique_tokens
    assert found.trajectory_saving == found.trajectory_tokens / found.unique_tokens
    assert statistics.prompt_tokens.max == prompt
    assert statistics.response_tokens.max == second - prompt


def test_prompts_that_differ_share_what_they_begin_with(write_jsonl: Any) -> None:
    trajectories = [{"messages": talk(question, "one")} for question in ("abcd", "aXYZ")]
    statistics = summarize_dataset(
        load_preferences(write_jsonl({"trajectories": trajectories}), build_agent_tokenizer(PLAIN))
    )
    assert statistics.prompt_saving == statistics.prefix_saving == 62 / (62 - 22)


def test_rows_of_other_kinds_have_no_trajectories(write_jsonl: Any) -> None:
    path = write_jsonl({"prompt": [say("user", "a")], "chosen": "b", "rejected": "c"})
    assert summarize_dataset(load_preferences(path, build_agent_tokenizer(PLAIN))).trajectories is None


def test_inspect_shows_trajectories_and_what_rewriting_costs(write_jsonl: Any, tmp_path: Path) -> None:
    build_agent_tokenizer(THINKS).save_pretrained(tmp_path / "tokenizer")
    trajectories = [{"messages": conversation(text, thinks=True), "score": 1} for text in ("warm", "cold")]
    path = write_jsonl({"id": "t", "trajectories": trajectories})
    app = typer.Typer()
    app.add_typer(data_command.app, name="data")
    result = CliRunner().invoke(app, ["data", "inspect", path, "--tokenizer", str(tmp_path / "tokenizer"), "--json"])
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    found, report = last["data"]["trajectories"], last["report"]
    assert found["turns_per_trajectory"] == {"mean": 4.0, "p50": 4, "p90": 4, "max": 4}
    assert (report["num_trajectories"], report["num_rewritten"], report["num_earlier_parts"]) == (2, 2, 4)
    shown = " ".join(result.stdout.split())
    for words in (
        f"2 at 1 tasks, {found['scored_tokens']} tokens scored, 2 of them in several token rows",
        f"{found['call_tokens']} tokens, {found['call_saving']:.2f}x the unique ones",
        f"{found['trajectory_tokens']} tokens, {found['trajectory_saving']:.2f}x the unique ones",
        f"{found['unique_tokens']} tokens in the prefix trees of the tasks",
        f"that takes {report['rewritten_tokens']} tokens more than their last rows alone",
    ):
        assert words in shown, words


def test_inspect_takes_turns_as_groups(write_jsonl: Any, tmp_path: Path) -> None:
    build_agent_tokenizer(PLAIN).save_pretrained(tmp_path / "tokenizer")
    trajectories = [{"messages": talk("a", text), "score": score} for text, score in (("one", 1), ("two", 0))]
    path = write_jsonl({"id": "t", "trajectories": trajectories})
    app = typer.Typer()
    app.add_typer(data_command.app, name="data")
    arguments = ["data", "inspect", path, "--tokenizer", str(tmp_path / "tokenizer"), "--trajectory-groups", "turn"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "turns make groups: 1 histories have different answers" in result.stdout


def test_rows_with_one_id_are_said_to_be_groups_of_their_own(write_jsonl: Any) -> None:
    rows = [
        {"id": name, "trajectories": [{"messages": [say("user", "q"), say("assistant", answer)], "score": 1}]}
        for name, answer in (("t", "a"), ("t", "b"), ("u", "a"), (None, "a"), (None, "b"))
    ]
    dataset = load_preferences(write_jsonl(*map(json.dumps, rows)), build_agent_tokenizer(PLAIN))
    assert dataset.report is not None
    (notice,) = dataset.report.notices
    assert notice.startswith("1 rows of trajectories have the id of an earlier row")
    assert len(dataset) == 5
