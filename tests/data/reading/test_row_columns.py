"""Columns beside prompt and responses: what each does to the groups, what is refused, and what the report says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvpref.data import DataOptions, PreferenceDataset, load_preferences
from kvpref.data.reading.messages import RowError
from kvpref.data.reading.rows import PreferenceRow, parse_row
from kvpref.errors import InputError

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be kind"}
GOOD = {"role": "assistant", "content": "hello"}
POOR = {"role": "assistant", "content": "go away"}
TEXTS = {"chosen": "hello", "rejected": "go away"}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [POOR]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
KWARGS = "chat_template_kwargs"


# What is taken as the prompt


@pytest.mark.parametrize("name", ["question", "query", "instruction", "prompts"])
@pytest.mark.parametrize("prompt", ["hi", [USER], ""], ids=["text", "messages", "empty"])
def test_other_names_of_the_prompt_mean_the_same(name: str, prompt: Any) -> None:
    row = parse_row({name: prompt, **TEXTS})
    assert row == parse_row({"prompt": prompt, **TEXTS})
    assert (row.prompt_column, row.unread) == (name, ())
    assert parse_row({name: "hi", "responses": ["a", "b"]}).prompt == "hi"


def test_input_goes_below_the_instruction() -> None:
    row = {"instruction": "Add.", **TEXTS}
    assert parse_row(row | {"input": "2 and 3"}).prompt == "Add.\n2 and 3"
    for empty in ("", None):
        assert parse_row(row | {"input": empty}).prompt == "Add."
    with pytest.raises(RowError, match="`input` must be a string, found int"):
        parse_row(row | {"input": 3})
    with pytest.raises(RowError, match="`instruction` must be a string beside `input`, found list"):
        parse_row({"instruction": [USER], "input": "x", **TEXTS})
    # Without an instruction it is a column like others.
    assert parse_row({"prompt": "hi", "input": "x", **TEXTS}).unread == ("input",)


def test_several_columns_that_might_be_the_prompt_are_refused() -> None:
    with pytest.raises(RowError, match="found `question` and `query` and no `prompt`; rename"):
        parse_row({"query": "a", "question": "b", **TEXTS})
    row = parse_row({"query": "a", "question": "b", "prompt": "c", **TEXTS})
    assert (row.prompt, row.prompt_column, row.unread) == ("c", None, ("query", "question"))


def test_a_bad_prompt_is_called_by_its_column() -> None:
    with pytest.raises(RowError, match=r"`prompts\[0\]` must be a message"):
        parse_row({"prompts": ["hi"], **TEXTS})
    with pytest.raises(RowError, match="`question` must be a string or a list of messages, found int"):
        parse_row({"question": 3, **TEXTS})
    with pytest.raises(RowError, match="leave `query` out"):
        parse_row({"query": "ho", "chosen": [USER, GOOD], "rejected": [USER, POOR]})


def test_a_prompt_column_may_be_the_losss_too() -> None:
    row = parse_row({"question": "hi", **TEXTS}, columns=("question",))
    assert (row.prompt, row.columns) == ("hi", {"question": "hi"})


# The system message


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        CHAT | {"prompt": [SYSTEM, USER]},
        CHAT | {"prompt": "hi"},
        CHAT | {"prompt": "hi", "chosen": "hello", "rejected": "go away"},
        CHAT | {"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, POOR]},
        {"chosen": [USER, GOOD], "rejected": [USER, POOR]},
        {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, POOR]},
        {"question": "hi", "chosen": [USER, GOOD], "rejected": [USER, POOR]},
    ],
)
def test_system_comes_first_in_every_shape(row: dict[str, Any]) -> None:
    expected = PreferenceRow((SYSTEM, USER), ((GOOD,), (POOR,)), labels=(True, False))
    assert parse_row(row | {"system": "be kind"}) == expected
    if row["chosen"] != [SYSTEM, USER, GOOD] and row.get("prompt") != [SYSTEM, USER]:
        assert parse_row(row | {"system": ""}).prompt == (USER,)


def test_null_system_is_none_and_leaves_texts_as_they_are() -> None:
    assert parse_row({"prompt": "hi", "system": None, **TEXTS}) == parse_row({"prompt": "hi", **TEXTS})


def test_system_with_responses() -> None:
    row = parse_row({"query": "hi", "system": "be kind", "responses": ["hello", "go away"], "ranks": [1, 2]})
    assert row == PreferenceRow((SYSTEM, USER), ((GOOD,), (POOR,)), ranks=(1.0, 2.0))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (CHAT | {"prompt": [SYSTEM, USER], "system": "be rude"}, "`system` differs from the system message"),
        (CHAT | {"system": 3}, "`system` must be a string, found int"),
        (TEXTS | {"system": "be kind"}, "the row is a conversation, and it has no prompt"),
        (TEXTS | {"prompt": "", "system": ""}, "`prompt` is empty, and with `system`"),
        (CHAT | {"system": "x\ud800"}, "`system` holds half of a surrogate pair"),
    ],
)
def test_bad_system(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(row)
    assert reason in str(caught.value)


# What goes to the chat template


@pytest.mark.parametrize("form", [lambda x: x, json.dumps], ids=["objects", "JSON"])
def test_tools_and_settings_go_to_the_template(form: Any) -> None:
    row = parse_row(CHAT | {"tools": form([TOOL]), KWARGS: form({"enable_thinking": False, "date": None})})
    assert row.template_settings == {"tools": [TOOL], "enable_thinking": False}
    assert row.unread == ()
    assert parse_row(CHAT | {"tools": [json.dumps(TOOL)]}).template_settings == {"tools": [TOOL]}


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools(tools: Any) -> None:
    for row in (CHAT, {"prompt": "hi", **TEXTS}):
        assert parse_row(row | {"tools": tools, KWARGS: tools and "{}"}).template_settings == {}


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"tools": TOOL}, "`tools` must be a list of objects, found object"),
        ({"tools": [3]}, "`tools[0]` must be an object, found int"),
        ({"tools": "[{"}, "`tools` is a string that is not valid JSON"),
        ({"tools": ["weather"]}, "`tools[0]` is a string that is not valid JSON"),
        ({KWARGS: [1]}, "`chat_template_kwargs` must be an object, found list"),
        ({KWARGS: {"tools": [TOOL]}}, "give them as the column `tools`"),
        *(
            ({KWARGS: {name: True}}, f"`chat_template_kwargs` holds `{name}`, which data may not set")
            for name in ("tokenize", "add_generation_prompt", "conversation", "return_dict", "return_tensors")
        ),
    ],
)
def test_bad_settings(columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(CHAT | columns)
    assert reason in str(caught.value)


@pytest.mark.parametrize("columns", [{"tools": [TOOL]}, {KWARGS: {"date": "today"}}])
def test_settings_of_plain_text_are_refused_and_with_system_it_is_none(columns: dict[str, Any]) -> None:
    (name,) = columns
    with pytest.raises(RowError, match=f"`{name}` is for the chat template, and the row is plain text"):
        parse_row({"prompt": "hi", **TEXTS, **columns})
    expected = columns.get(KWARGS, columns)
    assert parse_row({"prompt": "hi", "system": "", **TEXTS, **columns}).template_settings == expected


# What is refused, and nulls


@pytest.mark.parametrize("name", ["video", "videos", "audio", "audios"])
def test_what_a_model_would_have_to_see_is_refused(name: str) -> None:
    for value in (["a.png"], "a.png", {"path": "a.png"}, object()):
        with pytest.raises(RowError, match=f"`{name}` is not empty, and video and audio are not supported"):
            parse_row(CHAT | {name: value})
    for empty in (None, [], "", {}):
        assert parse_row(CHAT | {name: empty}).unread == ()


def test_nulls_inside_objects_go_and_items_of_lists_stay() -> None:
    call = {"function": {"name": "f", "arguments": {"city": "Rome", "unit": None, "days": [1, None]}}}
    row = CHAT | {"chosen": [{"role": "assistant", "content": None, "tool_calls": [call]}], "extra": {"a": [None]}}
    parsed = parse_row(row | {"extra": {"a": [None], "b": None}}, columns=("extra",))
    assert parsed.responses[0][0]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "days": [1, None]}
    assert parsed.columns == {"extra": {"a": [None]}}


# The report


def load(tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> PreferenceDataset:
    return load_preferences(rows, tokenizer, DataOptions(**options))


def notices(tokenizer: Any, *rows: dict[str, Any], **options: Any) -> tuple[str, ...]:
    report = load(tokenizer, list(rows), **options).report
    assert report is not None
    assert report.lines()[1:] == report.notices
    assert report.lines()[0].startswith(f"the rows given: {len(rows)} groups; 0 bad rows skipped; 0 prompts")
    return report.notices


def test_a_question_is_the_prompt_and_the_report_says_so(tokenizer) -> None:
    pair = {"chosen": "Rome.", "rejected": "Milan."}
    row = {"question": "What is the capital of Italy?", **pair}
    asked = load(tokenizer, [row])
    expected = load(tokenizer, [{"prompt": "What is the capital of Italy?", **pair}])
    assert asked.fingerprint == expected.fingerprint
    assert notices(tokenizer, row, row) == ("`question` is taken as the prompt, since there is no `prompt` (2 rows)",)
    assert notices(tokenizer, {"prompt": "x", **pair}) == ()
    with pytest.raises(InputError, match=r"row 2: .*no common beginning, so there is no prompt"):
        load(tokenizer, [row, pair])
    (line,) = notices(tokenizer, {"instruction": "x", "input": "", **pair})
    assert line.startswith("`instruction` (with `input` on a line of its own, where there is one) is taken")


def test_columns_that_nothing_reads_are_named_once(tokenizer) -> None:
    row = {"prompt": "hello", **TEXTS, "source": None, "length": [1, 2]}
    extra = {"prompt": "hello", **TEXTS, "id": 3, "scores": [1, 2], "query": "x", "system": None}
    assert notices(tokenizer, row, extra, row) == (
        "columns that nothing reads, at least in some rows: `id`, `length`, `query`, `scores`, `source`",
    )
    assert notices(tokenizer, row, columns=("length",)) == (
        "columns that nothing reads, at least in some rows: `source`",
    )


def test_implicit_prompts_repeated_prompts_and_mixed_kinds_are_counted(chat_tokenizer) -> None:
    implicit = {"chosen": "hello world", "rejected": "hello fox"}
    repeated = {"prompt": "hello", "chosen": "hello world", "rejected": "hello fox"}
    once = {"prompt": "hello", "chosen": " world", "rejected": "hello fox"}
    found = notices(chat_tokenizer, implicit, implicit, repeated, once, CHAT)
    assert [line.rpartition("(")[2] for line in found[:2]] == ["2 rows)", "1 row)"]
    assert found[0].startswith("the beginning that `chosen` and `rejected` have in common is taken as the prompt")
    assert found[1].startswith("every response begins with the text of the prompt")
    assert found[2] == "plain text and conversations are mixed: 4 rows of plain text, 1 written by the chat template"


def test_rows_of_ranks_make_groups_of_ranks(tokenizer) -> None:
    ranks = {"prompt": "hello", "responses": [" world", " fox"], "ranks": [1, 2]}
    (group,) = load(tokenizer, [ranks])
    assert (group.ranks, group.scores, group.id) == ((1.0, 2.0), (-1.0, -2.0), "row 1")
    scores = {"prompt": "hello", "responses": [" world", " fox"], "scores": [-1, -2]}
    assert load(tokenizer, [ranks]).fingerprint != load(tokenizer, [scores]).fingerprint


# What a template leaves out


def test_a_template_without_tools_or_system_is_refused(chat_tokenizer, build_tokenizer) -> None:
    with pytest.raises(InputError, match="row 1: the chat template does not write the tool 'weather' of `tools`"):
        load(chat_tokenizer, [CHAT | {"tools": [TOOL]}])
    deaf = build_tokenizer(
        chat_template="{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    load(deaf, [CHAT])
    with pytest.raises(InputError, match=r"row 1: the chat template does not write turn 1 .*'system' \('be kind'\)"):
        load(deaf, [CHAT | {"system": "be kind"}])


@pytest.mark.parametrize("value", [[0.5, float("nan")], float("inf"), [[0.5], [float("nan")]]])
def test_numbers_that_are_not_finite_are_refused_in_columns_that_the_loss_reads(
    value: Any, write_jsonl: Any, build_tokenizer: Any
) -> None:
    row = {"prompt": "hi ", "responses": ["hello", "go away"]}
    path = write_jsonl(row | {"advantages": [0.5, 1]}, row | {"advantages": value})
    with pytest.raises(InputError, match=rf"{path}:2: `advantages.* is (nan|inf); expected a finite number"):
        load_preferences(path, build_tokenizer(), DataOptions(columns=("advantages",)))
    # Nobody reads it here.
    assert parse_row(row | {"advantages": value}).unread == ("advantages",)
