"""Loading: bad rows, reports, fingerprints, lengths; and the same groups from every source."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from kvpref.data import (
    BadRow,
    DataOptions,
    GroupLengths,
    PreferenceDataset,
    load_preferences,
    load_tokenizer,
    measure_group,
    summarize_dataset,
)
from kvpref.data import group_loader as loading_module
from kvpref.errors import InputError, RunError
from kvpref.records.groups import Group, Sequence

SKIP = DataOptions(on_bad_row="skip")
PAIR = {"prompt": "hello", "chosen": " world", "rejected": " fox"}
SCORED = {"prompt": "the", "responses": [" dog", " fox", " dog"], "scores": [1, None, 0.5]}
BAD_LINES = {
    "not JSON": ('{"prompt": "a",', "not valid JSON"),
    "not an object": ("[1]", "expected a JSON object, found list"),
    "missing field": ({"prompt": "a", "chosen": "b"}, "missing field `rejected`"),
    "wrong type": (PAIR | {"chosen": 5}, "`chosen` must be a string"),
    "empty field": (PAIR | {"rejected": ""}, "`rejected` is empty"),
    "no responses": (SCORED | {"responses": []}, "`responses` is empty"),
    "scores length": (SCORED | {"scores": [1]}, "`scores` has 1 entries for 3 responses"),
    "scores type": (SCORED | {"scores": [1, "x", 2]}, "`scores[1]` must be a number"),
    "scores NaN": ('{"prompt": "a", "responses": ["b"], "scores": [NaN]}', "`scores[0]` is nan"),
    "same": (PAIR | {"rejected": " world"}, "`chosen` and `rejected` are the same"),
    "invalid message": (PAIR | {"prompt": [{"role": "user"}]}, "without `content`"),
    "invalid UTF-8": (b'{"prompt": "\xe9"}', "invalid UTF-8"),
    "half a character": ('{"prompt": "a", "responses": ["\\ud83d"]}', "surrogate"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_row_stops_with_place_reason_and_remedy(tokenizer, write_jsonl, line, reason):
    path = write_jsonl(PAIR, "", line, SCORED)
    with pytest.raises(InputError) as caught:
        load_preferences(path, tokenizer)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert reason in message
    assert "--on-bad-row skip" in message
    assert "\n" not in message


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_row_is_skipped_counted_and_listed(tokenizer, write_jsonl, line, reason):
    path = write_jsonl(PAIR, line, SCORED)
    dataset = load_preferences(path, tokenizer, SKIP)
    assert [group.id for group in dataset] == [f"{path}:1", f"{path}:3"]
    assert dataset.report is not None
    assert (dataset.report.num_rows, dataset.report.num_groups) == (3, 2)
    (bad,) = dataset.report.bad_rows
    assert bad.location == f"{path}:2"
    assert reason in bad.reason


def test_the_first_bad_row_is_named_even_if_only_its_tokens_are_bad(write_jsonl, build_tokenizer):
    path = write_jsonl(PAIR, {"prompt": "", "responses": ["a"]}, "not JSON")
    with pytest.raises(InputError, match=r"rows\.jsonl:2: .*no BOS token"):
        load_preferences(path, build_tokenizer(bos=False))


def test_bad_rows_are_listed_in_the_order_of_the_file(write_jsonl, build_tokenizer):
    path = write_jsonl({"prompt": "", "responses": ["a"]}, "not JSON", PAIR, {"prompt": "", "responses": ["a"]})
    report = load_preferences(path, build_tokenizer(bos=False), SKIP).report
    assert report is not None
    assert [row.location for row in report.bad_rows] == [f"{path}:{n}" for n in (1, 2, 4)]


def test_report_file_holds_one_object_per_bad_row(tokenizer, write_jsonl, tmp_path: Path):
    report = load_preferences(write_jsonl(PAIR, "[]", "{}"), tokenizer, SKIP).report
    assert report is not None
    report.write_bad_rows(tmp_path / "bad.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [BadRow(**line) for line in lines] == list(report.bad_rows)
    assert len(lines) == 2
    with pytest.raises(RunError, match="cannot write"):
        report.write_bad_rows(tmp_path / "bad.jsonl" / "below a file.jsonl")


@pytest.mark.parametrize("options", [DataOptions(), SKIP])
def test_empty_and_missing_files(tokenizer, write_jsonl, tmp_path: Path, options):
    with pytest.raises(InputError, match="the data is empty"):
        load_preferences(write_jsonl("", "  "), tokenizer, options)
    with pytest.raises(InputError, match="no such file"):
        load_preferences(str(tmp_path / "none.jsonl"), tokenizer, options)


def test_only_bad_rows_is_an_error_even_when_skipping(tokenizer, write_jsonl):
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .*all 2 rows .* are bad"):
        load_preferences(write_jsonl("{}", "[]"), tokenizer, SKIP)


def test_every_source_gives_the_same_groups(tokenizer, write_jsonl, tmp_path: Path):
    rows = [PAIR, PAIR | {"prompt": "hello hello"}]
    expected = load_preferences(write_jsonl(*rows), tokenizer)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name in ("rows.json", "rows.parquet", "saved"):
        assert load_preferences(str(tmp_path / name), tokenizer).fingerprint == expected.fingerprint


def test_messages_and_scores_survive_parquet(chat_tokenizer, write_jsonl, tmp_path: Path):
    user, reply = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "world", "name": "x"}
    rows = [{"prompt": [user], "responses": [[reply], [reply]], "scores": [1.0, None]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    from_parquet = load_preferences(str(tmp_path / "rows.parquet"), chat_tokenizer)
    assert from_parquet[0].scores == (1.0, None)
    assert from_parquet.fingerprint == load_preferences(write_jsonl(*rows), chat_tokenizer).fingerprint


def test_call_size_does_not_change_the_result(tokenizer, write_jsonl, monkeypatch: pytest.MonkeyPatch):
    path = write_jsonl(*[PAIR, SCORED, "{}"] * 5)
    whole = load_preferences(path, tokenizer, SKIP)
    for name in ("MAX_TEXTS_PER_CALL", "MAX_CHARS_PER_CALL"):
        with monkeypatch.context() as patch:
            patch.setattr(loading_module, name, 3)
            parts = load_preferences(path, tokenizer, SKIP)
        assert (parts.fingerprint, parts.report) == (whole.fingerprint, whole.report)


def test_sequence_protocol_and_pickling(tokenizer, write_jsonl):
    dataset = load_preferences(write_jsonl(PAIR, SCORED), tokenizer)
    assert len(dataset) == 2
    assert dataset[-1] == dataset[1] == list(dataset)[1]
    assert dataset[1].scores == (1.0, None, 0.5)
    assert dataset[1].labels is None
    for index in (2, -3):
        with pytest.raises(IndexError):
            dataset[index]
    copy = pickle.loads(pickle.dumps(dataset))
    assert list(copy) == list(dataset)
    assert copy.report == dataset.report


def test_dataset_made_of_groups_gives_them_back():
    groups = [
        Group([Sequence([5, 6, 70000], [False, False, True])], scores=[None], id="a"),
        Group([Sequence([5, 6], [False, True]), Sequence([5], [False])], labels=[True, False]),
    ]
    dataset = PreferenceDataset(groups)
    assert list(dataset) == groups
    assert dataset.report is None
    assert dataset.group_ids == ["a", None]


GROUP = Group([Sequence([5, 6], [False, True]), Sequence([5, 7], [False, True])], scores=[1.0, 0.0], id="a")
OTHERS = [
    Group([GROUP.sequences[0], Sequence([5, 8], [False, True])], scores=[1.0, 0.0]),
    Group([GROUP.sequences[0], Sequence([5, 7], [False, False])], scores=[1.0, 0.0]),
    Group(GROUP.sequences, scores=[1.0, 0.5]),
    Group(GROUP.sequences, scores=[1.0, None]),
    Group(GROUP.sequences, labels=[True, False]),
    Group(GROUP.sequences),
    Group(GROUP.sequences[::-1], scores=[1.0, 0.0]),
]


def test_fingerprint_covers_all_but_the_id():
    fingerprint = PreferenceDataset([GROUP]).fingerprint
    assert PreferenceDataset([replace_id(GROUP, "elsewhere")]).fingerprint == fingerprint
    assert fingerprint not in {PreferenceDataset([group]).fingerprint for group in OTHERS}
    assert PreferenceDataset([GROUP, OTHERS[0]]).fingerprint != PreferenceDataset([OTHERS[0], GROUP]).fingerprint
    # A constant, so that a change of the scheme (which would invalidate what users have stored) shows.
    assert fingerprint == "7df7c02052f36baf046db9fb30840a2e79895c7041ce734f725fb0c0b793d9cc"


def replace_id(group: Group, name: str) -> Group:
    return Group(group.sequences, scores=group.scores, labels=group.labels, id=name)


def test_lengths_share_what_sequences_share():
    def group(*sequences):
        return Group([Sequence(ids, [False] * len(ids)) for ids in sequences])

    # 1 2 is common to all, 1 2 3 only to two of them, of which one ends there.
    assert measure_group(group([1, 2, 3, 4], [1, 2, 9], [1, 2, 3])) == GroupLengths(5, 10, 4, 3, 3 + 7 + 3, 22, 0, 0, 2)
    assert measure_group(group([1, 2, 3])) == GroupLengths(3, 3, 3, 1, 6, 6, 0, 0)
    assert measure_group(group([1], [2])) == GroupLengths(2, 2, 1, 2, 2, 2, 0, 0)
    assert measure_group(group([1, 2], [1, 2], [1, 2, 3])) == GroupLengths(3, 7, 3, 3, 3 + 3, 12, 0, 0, 2)
    dataset = PreferenceDataset([group([1, 2], [1, 3]), group([4])])
    assert dataset.lengths == [GroupLengths(3, 4, 2, 2, 5, 6, 0, 0, 1), GroupLengths(1, 1, 1, 1, 1, 1, 0, 0)]


def test_map_groups_keeps_the_chosen(tokenizer, write_jsonl):
    dataset = load_preferences(write_jsonl(PAIR, PAIR), tokenizer)
    chosen = dataset.map_groups(lambda group: Group(group.sequences[:1], labels=group.labels[:1], id=group.id))
    assert [group.sequences for group in chosen] == [group.sequences[:1] for group in dataset]
    assert chosen.report == dataset.report
    assert chosen.fingerprint != dataset.fingerprint
    assert [lengths.num_sequences for lengths in chosen.lengths] == [1, 1]


def test_importing_the_data_layer_is_light():
    program = (
        "import sys, kvpref.data; sys.exit(bool({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


def test_options_are_frozen():
    with pytest.raises(AttributeError):
        SKIP.on_bad_row = "stop"  # type: ignore[misc]
    assert replace(SKIP, max_prompt_tokens=3).on_bad_row == "skip"


# Saving and mean lengths with GPT-NeoX tokens, as published beside the data; responses there are without EOS.
REAL_FILES = {
    "hh_harmless_pairs": (1878, 125, 45, 1.58),
    "gsm8k_groups": (1319, 59, 99, 1.39),
    "pandalm_groups": (143, 46, 51, 1.60),
}


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_data_gives_the_published_figures(shared_dir: Path, name: str):
    num_groups, prompt, response, saving = REAL_FILES[name]
    tokenizer = load_tokenizer(str(shared_dir / "tokenizers" / "gpt_neox_20b"))
    dataset = load_preferences(str(shared_dir / "data" / f"{name}.jsonl"), tokenizer)
    statistics = summarize_dataset(dataset)
    assert dataset.report is not None
    assert not dataset.report.bad_rows
    assert len(dataset) == num_groups
    assert round(statistics.prompt_tokens.mean) == prompt
    assert round(statistics.response_tokens.mean - 1) == response
    # EOS adds a token per response, which lowers the saving in the third digit.
    assert statistics.prompt_saving == pytest.approx(saving, abs=0.015)
    group = dataset[0]
    for sequence in group.sequences:
        assert sequence.input_ids[-1] == tokenizer.eos_token_id
        assert sequence.scored[-1]


@pytest.mark.full
def test_real_few_shot_prompts_share_what_was_measured(shared_dir: Path):
    tokenizer = load_tokenizer(str(shared_dir / "tokenizers" / "gpt_neox_20b"))
    dataset = load_preferences(str(shared_dir / "data" / "game24_groups.jsonl"), tokenizer)
    total = sum(lengths.total_tokens for lengths in dataset.lengths)
    # Published: 6.77 = N(P+R) / (P + NR) without EOS, for 100 responses each.
    without_eos = total - 100 * len(dataset)
    assert without_eos / (without_eos - 99 * 354 * len(dataset)) == pytest.approx(6.77, abs=0.005)
    assert summarize_dataset(dataset).prompt_tokens.mean == 354


def test_real_unstable_boundaries_are_tokenized_whole(shared_dir: Path):
    path = shared_dir / "data" / "tot_text_groups.jsonl"
    tokenizer = load_tokenizer(str(shared_dir / "tokenizers" / "gpt2"))
    dataset = load_preferences(str(path), tokenizer)
    num_unstable = 0
    for row, group in zip(map(json.loads, path.open(encoding="utf-8")), dataset, strict=True):
        prompt, response, whole = tokenizer([row["prompt"], row["responses"][0], row["prompt"] + row["responses"][0]])[
            "input_ids"
        ]
        sequence = group.sequences[0]
        assert list(sequence.input_ids) == [*whole, tokenizer.eos_token_id]
        scored = [token for token, flag in zip(sequence.input_ids, sequence.scored, strict=True) if flag]
        assert tokenizer.decode(scored[:-1]) == row["responses"][0]
        num_unstable += prompt + response != whole
    assert num_unstable > 50, "this file is here for its unstable boundaries"
