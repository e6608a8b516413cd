"""Tasks to groups: limits of length, columns by turn and token, and the answers where attempts part."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import pytest
from agent_templates import MARKED, PLAIN, build_agent_tokenizer, calls_of, conversation, say, scored_texts

from kvpref.data import DataOptions, load_preferences
from kvpref.errors import InputError


@pytest.fixture(scope="module")
def agent_tokenizer() -> Any:
    return build_agent_tokenizer(PLAIN)


def talk(*said: str) -> list[dict[str, Any]]:
    """Questions and answers by turns."""
    return [say("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(said)]


def test_whole_turns_at_the_end_are_left_out_with_their_entries(agent_tokenizer: Any, write_jsonl: Any) -> None:
    messages = talk("a", "bb", "c", "ddd", "e", "ffff")
    # Answers take 3, 4 and 5 tokens with their ends, and 4 stand between them: 20 in all, 11 without the last.
    trajectory = {"messages": messages, "turn_scores": [1, 2, 3], "logps": [float(n) for n in range(12)]}
    path = write_jsonl({"id": "t", "trajectories": [trajectory]})
    for limit, num_turns in ((20, 3), (19, 2), (11, 2), (10, 1), (3, 1)):
        options = DataOptions(max_response_tokens=limit, columns=("logps",))
        dataset = load_preferences(path, agent_tokenizer, options)
        [sequence] = dataset[0].sequences
        assert scored_texts(sequence, agent_tokenizer) == ["bb<|end|>", "ddd<|end|>", "ffff<|end|>"][:num_turns], limit
        assert dataset[0].columns["turn_scores"] == [[1.0, 2.0, 3.0][:num_turns]]
        assert dataset[0].columns["logps"] == [[float(n) for n in range(sequence.num_scored)]]
        assert dataset.report is not None
        assert dataset.report.num_truncated_responses == (num_turns < 3)
    with pytest.raises(InputError, match=r"rows\.jsonl:1: column `logps` .* whose first turn is cut to 2"):
        load_preferences(path, agent_tokenizer, DataOptions(max_response_tokens=2, columns=("logps",)))
    [group] = load_preferences(path, agent_tokenizer, DataOptions(max_response_tokens=2))
    assert scored_texts(group.sequences[0], agent_tokenizer) == ["bb"]


def test_prompts_lose_their_beginning_alike(agent_tokenizer: Any, write_jsonl: Any) -> None:
    system = say("system", "0123456789")
    trajectories = [{"messages": [system, *talk(question, "x", "y", "z")]} for question in ("ab", "abc")]
    path = write_jsonl({"id": "t", "trajectories": trajectories})
    dataset = load_preferences(path, agent_tokenizer, DataOptions(max_prompt_tokens=10))
    texts = [agent_tokenizer.decode(sequence.ids.tolist()) for sequence in dataset[0].sequences]
    assert texts == [
        f"{begin}<|end|><|user|>{question}<|end|><|assistant|>x<|end|><|user|>y<|end|><|assistant|>z<|end|>"
        for begin, question in (("789", "ab"), ("789", "abc"))
    ]
    assert dataset.report is not None
    assert (dataset.report.num_truncated_prompts, dataset.report.prompt_tokens_cut) == (1, 8)


def test_scores_that_differ_between_calls_are_scores_by_turn(agent_tokenizer: Any, write_jsonl: Any) -> None:
    rows = [
        {**row, "score": score, "seen": [score]}
        for attempt, scores in ((0, (1, 2)), (1, (3, 3)))
        for row, score in zip(calls_of(talk("a", "b", "c", "d"), id="t", attempt=attempt), scores, strict=True)
    ]
    [group] = load_preferences(write_jsonl(*rows), agent_tokenizer, DataOptions(columns=("seen",)))
    assert group.scores is None
    assert group.columns == {"turn_scores": [[1, 2], [3, 3]], "seen": [[1, 2], [3, 3]]}


def test_calls_without_attempts_are_responses_of_their_task(agent_tokenizer: Any, write_jsonl: Any) -> None:
    history = talk("a", "b", "c")
    rows = [
        {"messages": history, "response": text, "id": name, "score": n}
        for n, (text, name) in enumerate([("x", "t"), ("other", 7), ("y", "t"), ("z", "t")])
    ]
    first, second = load_preferences(write_jsonl(*rows), agent_tokenizer)
    assert [scored_texts(sequence, agent_tokenizer) for sequence in first.sequences] == [
        [f"{text}<|end|>"] for text in "xyz"
    ]
    assert first.scores == (0, 2, 3)
    assert [str(group.id).rpartition("rows.jsonl")[2] for group in (first, second)] == [":1 (t)", ":2 (7)"]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["compared", "marked"])
@pytest.mark.parametrize("kind", ["trajectories", "calls"])
def test_turns_make_groups_where_attempts_part(template: str, kind: str, write_jsonl: Any) -> None:
    tokenizer = build_agent_tokenizer(template)
    talks = [
        talk("q", "one", "more", "left"),
        talk("q", "one", "more", "right"),
        talk("q", "two", "more", "left"),
        talk("q", "one", "stop", "left"),
        talk("q", "one", "more", "right"),
    ]
    scores = (1.0, 0.0, 0.5, 0.25, 0.75)
    rows = [{"id": "t", "trajectories": [{"messages": m, "score": s} for m, s in zip(talks, scores, strict=True)]}]
    if kind == "calls":
        rows = [
            row
            for n, (m, s) in enumerate(zip(talks, scores, strict=True))
            for row in calls_of(m, id="t", attempt=n, score=s)
        ]
    dataset = load_preferences(write_jsonl(*rows), tokenizer, DataOptions(trajectory_groups="turn"))
    texts = [[scored_texts(sequence, tokenizer) for sequence in group.sequences] for group in dataset]
    assert texts == [[["one<|end|>"], ["two<|end|>"]], [["left<|end|>"], ["right<|end|>"]]]
    # By hand: the mean over the attempts that go through each answer.
    assert [group.scores for group in dataset] == [((1.0 + 0.0 + 0.25 + 0.75) / 4, 0.5), (1.0, (0.0 + 0.75) / 2)]
    for group in dataset:
        first, second = ([*sequence.input_ids[: sequence.turns[0][0]]] for sequence in group.sequences)
        assert first == second
    assert dataset.report is not None
    # "two" and "stop" are each answered once.
    assert (dataset.report.num_branches, dataset.report.num_single) == (2, 2)


def test_turn_scores_and_columns_by_turn_go_with_the_answers(agent_tokenizer: Any, write_jsonl: Any) -> None:
    items = [
        {"messages": talk("q", "one", "more", text), "turn_scores": turns, "gain": [7, n], "kind": str(n)}
        for n, (text, turns) in enumerate((("left", [5, 1]), ("right", [5, 3])))
    ]
    options = DataOptions(trajectory_groups="turn", columns=("gain", "kind"))
    [group] = load_preferences(write_jsonl({"id": "t", "trajectories": items}), agent_tokenizer, options)
    assert group.scores == (1, 3)
    assert group.columns == {"gain": [0, 1], "kind": ["0", "1"]}


def test_data_without_branches_says_so(agent_tokenizer: Any, write_jsonl: Any) -> None:
    path = write_jsonl({"id": "t", "trajectories": [{"messages": talk("q", "one")}, {"messages": talk("p", "two")}]})
    with pytest.raises(InputError, match="no history that attempts of a task share and then answer differently"):
        load_preferences(path, agent_tokenizer, DataOptions(trajectory_groups="turn"))


def test_real_trajectories_score_each_assistant_turn(shared_dir: Any) -> None:
    tokenizer = build_agent_tokenizer(PLAIN)
    with (shared_dir / "data" / "tau_airline_trajectories.jsonl").open() as file:
        rows = [json.loads(line) for line in islice(file, 2)]
    for group, row in zip(load_preferences(rows, tokenizer), rows, strict=True):
        assert group.id is not None
        assert group.id.endswith(f"({row['id']})")
        for sequence, trajectory in zip(group.sequences, row["trajectories"], strict=True):
            turns = [message for message in trajectory["messages"] if message["role"] == "assistant"]
            texts = scored_texts(sequence, tokenizer)
            assert len(texts) == len(turns)
            for text, message in zip(texts, turns, strict=True):
                calls = [item["function"] for item in message.get("tool_calls") or ()]
                written = [
                    f"<call>{item['name']} {json.dumps(item['arguments'], ensure_ascii=False)}</call>" for item in calls
                ]
                assert text == f"{message['content'] or ''}{''.join(written)}<|end|>"


def test_conversation_of_the_templates_is_long_enough() -> None:
    assert sum(message["role"] == "assistant" for message in conversation("x")) == 4
