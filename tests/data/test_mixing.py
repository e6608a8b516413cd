"""Several sources as one data set: an epoch's shares, its report, and where repeated groups go."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvpref.data import DataOptions, PreferenceDataset, load_preferences
from kvpref.data.mixing import copy_numbers, mix, tell_copies_apart
from kvpref.errors import InputError


@pytest.fixture
def sources(write_jsonl: Any, tmp_path: Path) -> list[str]:
    """Three pairs and one."""
    paths = []
    for name, words in (("a", ("one", "two", "three")), ("b", ("four",))):
        written = write_jsonl(*({"prompt": word, "chosen": " good", "rejected": " bad"} for word in words))
        paths.append(str(Path(written).rename(tmp_path / f"{name}.jsonl")))
    return paths


def ids(dataset: PreferenceDataset) -> list[str]:
    return [Path(str(name)).name for name in dataset.group_ids]


def test_shares_are_in_proportion_and_add_up() -> None:
    order = mix([10, 2, 4], [1, 1, 2], seed=0)
    assert len(order) == 16
    assert [sum(first <= index < stop for index in order) for first, stop in ((0, 10), (10, 12), (12, 16))] == [4, 4, 8]
    counts = Counter(order)
    assert {counts[index] for index in range(10, 16)} == {2}
    assert {counts[index] for index in range(10)} == {0, 1}
    assert len(mix([1, 1, 1], [1, 1, 1.5], 0)) == 3


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    assert mix([50, 50], [3, 1], 7) == mix([50, 50], [6, 2], 7) != mix([50, 50], [3, 1], 8)
    repeated = Counter(mix([50, 50], [3, 1], 7))
    assert sorted(repeated[index] for index in range(50)) == [1] * 25 + [2] * 25


def test_without_weights_sources_follow_one_another(sources: list[str], tokenizer: Any) -> None:
    both = load_preferences(sources, tokenizer)
    assert ids(both) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1"]
    single = [list(load_preferences(path, tokenizer)) for path in sources]
    assert both.fingerprint == PreferenceDataset([*single[0], *single[1]]).fingerprint
    assert both.report is not None
    assert (both.report.num_rows, both.report.num_groups) == (4, 4)
    assert both.report.source == " + ".join(sources)
    assert [line.endswith("3 groups") for line in both.report.notices] == [True, False]


def test_weights_repeat_and_leave_out_and_the_report_says_so(sources: list[str], tokenizer: Any) -> None:
    found = load_preferences(sources, tokenizer, DataOptions(data_weights=(1, 1)))
    assert len(found) == 4
    assert ids(found).count("b.jsonl:1") == 2
    assert len({*ids(found)}) == 3
    assert found.report is not None
    assert [line.rpartition(": each ")[2] for line in found.report.notices] == [
        "0.67 times on average",
        "2.00 times on average",
    ]
    assert found.fingerprint != load_preferences(sources, tokenizer).fingerprint
    assert found.fingerprint == load_preferences(sources, tokenizer, DataOptions(data_weights=(3, 3))).fingerprint


def test_a_source_whose_share_is_less_than_a_group_is_named(sources: list[str], tokenizer: Any) -> None:
    found = load_preferences(sources, tokenizer, DataOptions(data_weights=(100, 1)))
    assert "b.jsonl:1" not in ids(found)
    assert found.report is not None
    assert found.report.notices[1] == (
        f"{sources[1]}: 1 groups, none in an epoch, since its share of 4 groups is less than one; raise its weight, or "
        "leave it out"
    )


def test_notices_name_their_source_unless_all_have_them(sources: list[str], tokenizer: Any) -> None:
    for path in sources:
        text = Path(path).read_text().replace('"prompt"', '"note": 1, "question"')
        Path(path).write_text(text if path == sources[0] else text.replace('"question"', '"query"'))
    report = load_preferences(sources, tokenizer).report
    assert report is not None
    assert report.notices[2] == "columns that nothing reads, at least in some rows: `note`"
    assert report.notices[3].startswith(f"{sources[0]}: `question` is taken as the prompt")
    assert report.notices[4].startswith(f"{sources[1]}: `query`")


def test_bad_rows_of_every_source_are_listed(sources: list[str], tokenizer: Any) -> None:
    for path in sources:
        Path(path).write_text("[]\n" + Path(path).read_text())
    report = load_preferences(sources, tokenizer, DataOptions(on_bad_row="skip")).report
    assert report is not None
    assert [row.location for row in report.bad_rows] == [f"{path}:1" for path in sources]


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, float("nan")), (-1.0, 2.0), (1.0,), (1.0, 2.0, 3.0)])
def test_weights_that_mean_nothing_are_refused(sources: list[str], tokenizer: Any, weights: Any) -> None:
    with pytest.raises(InputError, match="data_weights must be"):
        load_preferences(sources, tokenizer, DataOptions(data_weights=weights))


def test_a_list_of_paths_and_rows_is_refused(sources: list[str], tokenizer: Any) -> None:
    with pytest.raises(InputError, match="holds dict too"):
        load_preferences([sources[0], {"prompt": "a"}], tokenizer)  # type: ignore[list-item]


def test_copies_of_a_group_do_not_share_a_step_for_being_alike(tokenizer: Any) -> None:
    prompts = [f"{word} is the word that begins this prompt, which goes on for a while" for word in ("hello", "the")]
    rows = [{"prompt": prompt, "responses": [f" {answer}"]} for prompt in prompts for answer in ("a", "b")]
    groups = list(load_preferences(rows, tokenizer))
    once = PreferenceDataset(groups).clusters(2, 1)
    assert once.of_group == (0, 0, 2, 2)
    twice = PreferenceDataset([*groups, *groups]).clusters(2, 1)
    assert twice.of_group == (0, 0, 2, 2, 4, 4, 6, 6)
    assert twice.shared_tokens == once.shared_tokens * 2


def test_copies_are_told_by_ids() -> None:
    assert copy_numbers(["a", "b", "a", None, None, "a"]) == [0, 0, 1, 0, 0, 2]
    beginning = array("i", [5, 6])
    assert tell_copies_apart(beginning, 0) is beginning
    first, second = (tell_copies_apart(beginning, copy) for copy in (1, 2))
    assert first[0] != second[0] != beginning[0]
    assert first[1:] == second[1:] == array("q", [6])
