"""Which shape a row has, where several might fit, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from kvpref.data.reading.messages import RowError
from kvpref.data.reading.rows import PreferenceRow, parse_row

USER = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "hello"}
POOR = {"role": "assistant", "content": "go away"}
PAIR = PreferenceRow((USER,), ((GOOD,), (POOR,)), labels=(True, False))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER], "chosen": GOOD, "rejected": POOR},
        {"messages": "hi", "chosen": [GOOD], "rejected": [POOR]},
        {"messages": [USER], "chosen": "hello", "rejected": "go away"},
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": GOOD, "rejected": POOR},
        {"messages": [USER, GOOD], "rejected_response": "go away"},
        {"messages": [USER, GOOD], "rejected_response": [POOR]},
        {"messages": [USER, GOOD], "rejected_messages": [USER, POOR]},
        {"query": "hi", "response": [GOOD], "rejected_response": [POOR]},
        {"instruction": "hi", "chosen_response": [GOOD], "rejected_response": [POOR]},
        {"input": "hi", "chosen": GOOD, "rejected": POOR},
        {"prompt": "hi", "history": [], "chosen": "hello", "rejected": "go away"},
        {"prompt": "hi", "system": "", "output": None, "chosen": "hello", "rejected": "go away"},
    ],
)
def test_pairs_of_other_tools(row: dict[str, Any]) -> None:
    parsed = parse_row(row)
    assert parsed == PAIR
    assert parsed.unread == ()


def test_conversations_with_their_prompt_need_no_messages() -> None:
    """The rows of ultrafeedback_binarized, whose `messages` are the chosen conversation again."""
    row = {"chosen": [USER, GOOD], "rejected": [USER, POOR], "messages": [USER, GOOD]}
    for prompt in ({}, {"prompt": "hi"}):
        parsed = parse_row({**row, **prompt})
        assert parsed == PAIR
        assert parsed.unread == ("messages",)


def test_earlier_rounds_stand_before_the_prompt() -> None:
    row = parse_row({"query": "and now?", "history": [["hi", "hello"]], "response": "bye", "rejected_response": "no"})
    assert row.prompt == (USER, GOOD, {"role": "user", "content": "and now?"})
    assert row.notices == ("`history` is written as the rounds before the prompt, in a conversation",)
    # Other data sets call a text so.
    assert parse_row({"prompt": "hi", "history": "once", "responses": ["a"]}).unread == ("history",)


@pytest.mark.parametrize("names", [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")])
def test_pairs_have_scores(names: tuple[str, str]) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    parsed = parse_row({**row, names[0]: 8.5, names[1]: 3})
    assert (parsed.scores, parsed.labels, parsed.unread) == ((8.5, 3.0), (True, False), ())
    assert parse_row({**row, names[0]: None, names[1]: None}).scores is None
    assert parse_row({**row, names[0]: 2, names[1]: None}).scores == (2.0, None)
    (notice,) = parse_row({**row, names[0]: 2, names[1]: 2}).notices
    assert notice.endswith("and equal: losses that compare scores see no preference")
    with pytest.raises(RowError, match=f"`{names[0]}` is 1 and `{names[1]}` 2, so that `chosen` is the worse"):
        parse_row({**row, names[0]: 1, names[1]: 2})


def test_our_own_names_of_scores_go_before_others_that_say_the_same() -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_rating": 5, "rejected_rating": 4}
    assert parse_row({**pair, "score_chosen": 5.0, "score_rejected": 4}).scores == (5.0, 4.0)
    with pytest.raises(RowError, match="found `chosen_score` and `chosen_rating`, and either may be the score"):
        parse_row({**pair, "chosen_score": 2})
    group = {"prompt": "p", "responses": ["a", "b"], "rewards": [1, 2]}
    assert parse_row(group).scores == (1.0, 2.0)
    own = parse_row({**group, "scores": [1.0, 2]})
    assert (own.scores, own.unread) == ((1.0, 2.0), ("rewards",))
    assert parse_row({**group, "ranks": [1, 2]}).scores is None
    with pytest.raises(RowError, match="found `rewards` and `ratings`, and either may be the scores"):
        parse_row({**group, "ratings": [3, 4]})
    single = {"prompt": "p", "completion": "a", "reward": 3}
    assert parse_row({**single, "score": 3}).scores == (3.0,)
    with pytest.raises(RowError, match="found `reward` and `rating`"):
        parse_row({**single, "rating": 4})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1, "chosen_rating": 1},
            "`score_chosen` is 2 and `chosen_rating` 1, and either may be the rating; choose one, as with --column "
            "score_chosen=chosen_rating (or score_chosen=score_chosen)",
        ),
        (
            {"chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1, "rejected-rating": 4},
            "`score_rejected` is 1 and `rejected-rating` 4, and either",
        ),
        (
            {"responses": ["a", "b"], "scores": [1, 0], "rewards": [1, None]},
            "`scores` is [1, 0] and `rewards` [1, null]",
        ),
        ({"completion": "a", "score": 1, "rating": "low"}, '`score` is 1 and `rating` "low", and either'),
    ],
)
def test_ratings_that_say_different_things_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row({"prompt": "p", **row})
    assert str(caught.value).startswith(reason)


def test_objects_hold_a_response_and_its_rating() -> None:
    items = [{"response": "a", "overall_score": 4, "fine-grained_score": 1, "model": "m"}, {"response": "b"}]
    row = parse_row({"prompt": "p", "completions": items})
    assert (row.responses, row.scores) == (("a", "b"), (4.0, None))
    assert row.unread == ("completions.fine-grained_score", "completions.model")
    assert row.names == ("`completions[0].response`", "`completions[1].response`")
    ranked = parse_row({"prompt": "p", "answers": [{"answer": "a", "rank": 2}, {"answer": "b", "rank": 1}]})
    assert (ranked.ranks, ranked.scores) == ((2.0, 1.0), None)
    assert parse_row({"prompt": "p", "responses": [{"response": "a", "reward": 2}]}).scores == (2.0,)


def test_gold_answers_beside_a_response_are_no_responses() -> None:
    row = parse_row({"prompt": "p", "completion": "a", "reward": 1, "answers": ["a", "b"]})
    assert (row.responses, row.unread) == (("a",), ("answers",))


def test_a_label_that_nothing_reads_is_named() -> None:
    assert parse_row({"prompt": "p", "chosen": "a", "rejected": "b", "label": False}).unread == ("label",)


REFUSED = {
    "two responses": ({"prompt": "p", "completion": "a", "output": "b"}, "found `completion` and `output`, and either"),
    "two lists": ({"prompt": "p", "completions": ["a"], "generations": ["b"]}, "found `completions` and `generations`"),
    "label and score": ({"prompt": "p", "completion": "a", "label": 1, "score": 2}, "found `label` and `score`, and"),
    "whole conversation": (
        {"messages": [USER, GOOD], "chosen": "a", "rejected": "b"},
        "`messages` ends with an assistant turn: with `chosen` behind it, it may be the prompt, or the whole",
    ),
    "no answer": ({"messages": [USER], "rejected_response": "a"}, "the last of `messages` is of role 'user'; expected"),
    "no question": ({"messages": [GOOD], "label": 1}, "`messages` holds nothing but a response; put the messages"),
    "both": ({"messages": [USER], "completion": "a", "label": 1}, "found `messages` and `completion`, and either may"),
    "both rejected": (
        {"messages": [USER, GOOD], "rejected_response": "a", "rejected_messages": [USER, POOR]},
        "found `rejected_response` and `rejected_messages`, and either may be the worse response",
    ),
    "same": ({"messages": [USER, GOOD], "rejected_response": "hello"}, "the same, so the pair holds no preference"),
    "three outputs": ({"instruction": "p", "output": ["a", "b", "c"]}, "`output` is a list of 3 items; expected two"),
    "half scores": (
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": 3, "score_rejected": 5},
        "found `score_chosen` and `chosen_score`, and either may be the score of the pair",
    ),
    "prompt alone": ({"prompt": "p"}, "missing field `responses`; expected {prompt, chosen, rejected}"),
    "no prompt": ({"completion": "a", "label": True}, "missing field `responses`"),
    "labelled text": ({"text": "a", "label": 1}, "found `text`, `label`"),
    "round": ({"prompt": "p", "history": [["a"]], "responses": ["b"]}, "`history[0]` must be a list of two texts"),
    "rounds of messages": (
        {"prompt": [USER], "history": [["a", "b"]], "responses": ["b"]},
        "found `history` beside a `prompt` of messages",
    ),
    "two ratings": (
        {"prompt": "p", "completions": [{"response": "a", "score": 1, "rank": 2}]},
        "`completions[0]` has `score` and `rank`, and either may rate it",
    ),
}


@pytest.mark.parametrize(("row", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_may_mean_two_things_is_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(row)
    assert reason in str(caught.value)
