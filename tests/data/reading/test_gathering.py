"""Rows of one response: which become a group, and what cannot be one."""

from __future__ import annotations

from typing import Any

import pytest

from kvpref.data import DataOptions, PreferenceDataset, load_preferences
from kvpref.errors import InputError


def row(completion: str, prompt: Any = "hello", **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **columns}


def load(tokenizer: Any, *rows: Any, **options: Any) -> PreferenceDataset:
    return load_preferences(list(rows), tokenizer, DataOptions(**options))


def scores(dataset: PreferenceDataset) -> list[tuple[str | None, Any]]:
    return [(group.id, group.scores) for group in dataset]


def test_rows_of_a_prompt_are_one_group_wherever_they_stand(tokenizer: Any) -> None:
    rows = [row("a", score=1), row("b", "the", score=2), row("c", score=3), row("d", "the", score=None)]
    found = load(tokenizer, *rows)
    assert scores(found) == [("row 1", (1.0, 3.0)), ("row 2", (2.0, None))]
    same = load(
        tokenizer,
        {"prompt": "hello", "responses": ["a", "c"], "scores": [1, 3]},
        {"prompt": "the", "responses": ["b", "d"], "scores": [2, None]},
    )
    assert found.fingerprint == same.fingerprint
    assert found.report is not None
    assert found.report.notices == ("rows of one response were gathered by their prompt: 4 rows, 2 groups",)


def test_demonstrations_stay_apart(tokenizer: Any) -> None:
    found = load(tokenizer, row("a"), row("b"), row("c", "the", label=True))
    assert scores(found) == [("row 1", None), ("row 2", None), ("row 3", (1.0,))]
    assert scores(load(tokenizer, row("a", n=1), row("b", n=1), group_by="n")) == [("row 1 (1)", None)]


@pytest.mark.parametrize(
    ("value", "score"), [(True, 1), (False, 0), (1, 1), (0, 0), (1.0, 1), ("true", 1), ("False", 0)]
)
def test_labels_are_scores_of_one_and_zero(tokenizer: Any, value: Any, score: float) -> None:
    for name in ("label", "kto_tag"):
        assert scores(load(tokenizer, row("a", **{name: value}))) == [("row 1", (score,))]


@pytest.mark.parametrize("value", [-1, 2, 0.5, "good", [True], "1"])
def test_other_labels_are_refused(tokenizer: Any, value: Any) -> None:
    with pytest.raises(InputError, match=r"row 1: `label` is .*; expected true or false"):
        load(tokenizer, row("a", label=value))


def test_tools_and_settings_tell_prompts_apart(build_tokenizer: Any) -> None:
    template = "{{ mood }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    chat = build_tokenizer(
        chat_template=template.replace("assistant: ", "{% if add_generation_prompt %}assistant: {% endif %}")
    )
    ask = [{"role": "user", "content": "hello"}]
    rows = [row("a", ask, label=1, chat_template_kwargs={"mood": mood}) for mood in ("x", "y", "x")]
    assert [len(group) for group in load(chat, *rows)] == [2, 1]


def test_columns_and_weights_become_one_entry_per_response(tokenizer: Any) -> None:
    rows = [row("a", score=1, gain=[1, 2], token_weights=2), row("bb", score=0, gain=3)]
    (group,) = load(tokenizer, *rows, columns=("gain",))
    assert dict(group.columns) == {"gain": [[1, 2], 3]}
    assert [sequence.weights is None for sequence in group.sequences] == [False, True]
    assert set(group.sequences[0].weights or ()) == {2.0}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (
            [row("a", n=7), row("b", "the", n=8), row("c", "other", n=7)],
            "row 3: `prompt` differs from that of the row at row 1 of the same `n`, '7'",
        ),
        ([row("a", n=7), row("b")], "row 2: missing column `n`, which rows are gathered by"),
        ([row("a", n=1.5)], "row 1: `n`, which rows are gathered by, must be a string or integer; found float"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c", "n": 1}],
            "row 1: the row has 2 responses of its own, and `n`",
        ),
        (
            [{"messages": [], "response": "a", "id": 3, "n": 1}],
            "row 1: the row is a call of a model, which `id` gathers",
        ),
    ],
)
def test_what_a_column_cannot_gather(tokenizer: Any, rows: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(InputError) as caught:
        load(tokenizer, *rows, group_by="n")
    assert str(caught.value).startswith(reason)


def test_all_responses_are_rated_by_one_column(tokenizer: Any) -> None:
    rows = [row("a", label=True), row("b"), row("c", "the", reward=0.3), row("d", label=False)]
    with pytest.raises(InputError, match=r"^row 3: .* rated by `reward`, and that at row 1 by `label`; rate all"):
        load(tokenizer, *rows)
    found = load(tokenizer, *rows, on_bad_row="skip")
    assert scores(found) == [("row 1", (1.0, None, 0.0))]
    assert found.report is not None
    assert [bad.location for bad in found.report.bad_rows] == ["row 3"]


def test_a_response_with_two_ratings_is_counted_and_named(tokenizer: Any) -> None:
    found = load(
        tokenizer,
        row("a", label=True),
        row("b", label=False),
        row("b", label=False),
        row("a", label=False),
        row("a", "the", label=True),
        row("a", "the", label=None),
        {"prompt": "other", "responses": ["a", "b", "a"], "scores": [1, 1, 2]},
    )
    assert found.report is not None
    assert found.report.notices[0] == (
        "a response stands twice in its group and is rated differently; keep the rating that is meant "
        "(2 groups, such as `responses[0]` and `responses[2]` of row 7)"
    )
    found = load(tokenizer, row("a", label=True), row("b", label=False), row("a", label=False))
    assert found.report is not None
    assert found.report.notices[0].endswith("(1 group, such as `completion` of row 1 and `completion` of row 3)")
    found = load(tokenizer, row("a", score=1), row("b", score=0), row("a", score=1))
    assert found.report is not None
    assert len(found.report.notices) == 1


def test_the_same_messages_with_two_ranks_are_named(chat_tokenizer: Any) -> None:
    answer = [{"role": "assistant", "content": "a"}]
    found = load(chat_tokenizer, {"prompt": "the", "responses": [answer, answer], "ranks": [1, 2]})
    assert found.report is not None
    assert found.report.notices[0].endswith("(1 group, such as `responses[0]` and `responses[1]` of row 1)")


def test_a_response_is_called_by_its_column_and_place(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="row 2: `completion` is empty"):
        load(tokenizer, row("a", label=True), row("", label=False))


def test_a_table_keeps_the_column_that_rows_are_gathered_by(tokenizer: Any, tmp_path: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    rows = [row("a", reward=1.0, problem="x"), row("b", reward=0.0, problem="x")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = load_preferences(str(path), tokenizer, DataOptions(group_by="problem"))
    assert scores(found) == [(f"{path}:row 1 (x)", (1.0, 0.0))]


@pytest.mark.parametrize("value", ["", 3, ("a",)])
def test_group_by_is_the_name_of_a_column(value: Any) -> None:
    with pytest.raises(InputError, match="group_by must be the name of a column, or None"):
        DataOptions(group_by=value)
