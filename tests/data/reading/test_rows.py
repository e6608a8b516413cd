"""Row shapes and every way in which a row can be bad."""

from __future__ import annotations

import pytest

from kvpref.data.reading.messages import RowError
from kvpref.data.reading.rows import PreferenceRow, parse_row

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be kind"}
GOOD = {"role": "assistant", "content": "hello"}
POOR = {"role": "assistant", "content": "go away"}


def test_text_pair():
    row = parse_row({"prompt": "a", "chosen": "b", "rejected": "c", "source": 3})
    assert row == PreferenceRow("a", ("b", "c"), labels=(True, False))


def test_empty_text_prompt_is_a_prompt():
    assert parse_row({"prompt": "", "chosen": "b", "rejected": "c"}).prompt == ""


def test_implicit_text_prompt():
    assert parse_row({"chosen": "ab", "rejected": "ac"}) == PreferenceRow(None, ("ab", "ac"), labels=(True, False))


@pytest.mark.parametrize("form", [lambda turn: [turn], lambda turn: turn, lambda turn: turn["content"]])
def test_message_pair_with_responses_in_any_form(form):
    row = parse_row({"prompt": [SYSTEM, USER], "chosen": form(GOOD), "rejected": form(POOR)})
    assert row == PreferenceRow((SYSTEM, USER), ((GOOD,), (POOR,)), labels=(True, False))


def test_implicit_messages_share_the_leading_ones():
    row = parse_row({"chosen": [SYSTEM, USER, GOOD, USER, GOOD], "rejected": [SYSTEM, USER, GOOD, USER, POOR]})
    assert row.prompt == (SYSTEM, USER, GOOD, USER)
    assert row.responses == ((GOOD,), (POOR,))


def test_text_prompt_with_messages():
    expected = PreferenceRow((USER,), ((GOOD,), (POOR,)), labels=(True, False))
    assert parse_row({"prompt": "hi", "chosen": [GOOD], "rejected": [POOR]}) == expected
    # The whole conversation repeated in each response, as ultrafeedback_binarized has it.
    assert parse_row({"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, POOR]}) == expected
    assert parse_row({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, POOR]}) == expected


def test_groups_with_scores_nulls_and_none():
    row = {"prompt": "a", "responses": ["b", "b", "c"]}
    assert parse_row(row) == PreferenceRow("a", ("b", "b", "c"))
    assert parse_row(row | {"scores": None}).scores is None
    assert parse_row(row | {"scores": [1, None, 0.5]}).scores == (1.0, None, 0.5)
    messages = parse_row({"prompt": [USER], "responses": [[GOOD], [POOR]], "scores": [1, 0]})
    assert messages == PreferenceRow((USER,), ((GOOD,), (POOR,)), scores=(1.0, 0.0))


def test_null_fields_count_as_missing():
    row = {"prompt": "a", "chosen": None, "rejected": None, "responses": ["b"], "scores": None}
    assert parse_row(row) == PreferenceRow("a", ("b",))
    message = USER | {"tool_calls": None}
    assert parse_row({"prompt": [message], "chosen": [GOOD], "rejected": [POOR]}).prompt == (USER,)


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
GROUP = {"prompt": "a", "responses": ["b", "c"]}
BAD_ROWS = {
    "list": ([1], "expected a JSON object, found list"),
    "null": (None, "expected a JSON object, found null"),
    "no fields": ({}, "missing field `responses`"),
    "no prompt": ({"responses": ["a"]}, "missing field `prompt`"),
    "no chosen": ({"prompt": "a", "rejected": "b"}, "missing field `chosen`"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "missing field `rejected`"),
    "both shapes": (PAIR | GROUP, "found both"),
    "prompt type": (PAIR | {"prompt": 3}, "`prompt` must be a string or a list of messages, found int"),
    "chosen type": (PAIR | {"chosen": True}, "`chosen` must be a string or a list of messages, found boolean"),
    "empty chosen": (PAIR | {"chosen": ""}, "`chosen` is empty"),
    "empty rejected": (PAIR | {"rejected": ""}, "`rejected` is empty"),
    "no prompt messages": (PAIR | {"prompt": []}, "`prompt` is empty"),
    "no chosen messages": (PAIR | {"chosen": []}, "`chosen` is empty"),
    "same": (PAIR | {"rejected": "b"}, "`chosen` and `rejected` are the same"),
    "surrogate": (PAIR | {"chosen": "x\ud800"}, "`chosen` holds half of a surrogate pair at character 2"),
    "no responses": (GROUP | {"responses": []}, "`responses` is empty"),
    "responses type": (GROUP | {"responses": "b"}, "`responses` must be a list, found string"),
    "response type": (GROUP | {"responses": ["b", 4]}, "`responses[1]` must be a string"),
    "empty response": (GROUP | {"responses": ["b", ""]}, "`responses[1]` is empty"),
    "scores length": (GROUP | {"scores": [1]}, "`scores` has 1 entries for 2 responses"),
    "scores type": (GROUP | {"scores": 1}, "`scores` must be a list"),
    "score string": (GROUP | {"scores": [1, "2"]}, "`scores[1]` must be a number or null, found string"),
    "score boolean": (GROUP | {"scores": [True, 1]}, "`scores[0]` must be a number or null, found boolean"),
    "score NaN": (GROUP | {"scores": [1, float("nan")]}, "`scores[1]` is nan"),
    "score infinite": (GROUP | {"scores": [float("inf"), 1]}, "`scores[0]` is inf"),
    "score huge": (GROUP | {"scores": [10**400, 1]}, "`scores[0]` is inf"),
    "message type": (PAIR | {"prompt": ["hi"]}, "`prompt[0]` must be a message"),
    "no role": (PAIR | {"prompt": [{"content": "hi"}]}, "`prompt[0]` is a message without `role`"),
    "no content": (PAIR | {"prompt": [USER, {"role": "user"}]}, "`prompt[1]` is a message without `content`"),
    "content type": (PAIR | {"prompt": [{"role": "user", "content": ["hi"]}]}, "`prompt[0].content` must be a string"),
    "blank message": (
        {"prompt": [USER], "chosen": [GOOD], "rejected": {"role": "assistant", "content": " "}},
        "`rejected` is empty",
    ),
    "mixed": ({"prompt": "a", "chosen": "b", "rejected": [POOR]}, "mix strings and messages"),
    "nothing shared": ({"chosen": [USER, GOOD], "rejected": [SYSTEM, POOR]}, "share no leading message"),
    "one begins the other": ({"chosen": [USER, GOOD], "rejected": [USER]}, "a response is empty"),
    "other prompt": ({"prompt": "ho", "chosen": [USER, GOOD], "rejected": [USER, POOR]}, "`prompt` is a string"),
}


@pytest.mark.parametrize(("value", "reason"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_row(value, reason):
    with pytest.raises(RowError) as caught:
        parse_row(value)
    assert reason in str(caught.value)


def test_ranks_are_no_scores() -> None:
    row = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, None]}
    assert (parse_row(row).scores, parse_row(row).ranks) == (None, (2.0, 1.0, None))
    with pytest.raises(RowError, match="both `scores` and `ranks`"):
        parse_row({**row, "scores": [1, 2, 3]})
    with pytest.raises(RowError, match=r"`ranks\[1\]` must be a number or null, found string"):
        parse_row({**row, "ranks": [1, "2", 3]})
    with pytest.raises(RowError, match="`ranks` has 2 entries for 3 responses"):
        parse_row({**row, "ranks": [1, 2]})
