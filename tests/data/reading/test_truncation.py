"""Cuts keep the prompt's end and the response's start, alike for all sequences of a group, and are counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvpref.data import DataOptions, load_preferences
from kvpref.data.reading.tokenization import TokenizedSequence
from kvpref.data.reading.truncation import truncate_row
from kvpref.errors import InputError

BOS = 1


def cut(sequences, prompt=None, response=None):
    return truncate_row(sequences, max_prompt_tokens=prompt, max_response_tokens=response, bos_token_id=BOS)


def test_prompt_keeps_its_end_and_the_response_its_start():
    row = cut([TokenizedSequence([10, 11, 12, 20, 21], 3), TokenizedSequence([10, 11, 12, 30], 3)], 2, 1)
    assert row.sequences == [TokenizedSequence([11, 12, 20], 2), TokenizedSequence([11, 12, 30], 2)]
    assert (row.prompt_tokens_cut, row.num_truncated_responses, row.response_tokens_cut) == (1, 1, 1)


def test_bos_stays_in_front_and_counts():
    row = cut([TokenizedSequence([BOS, 10, 11, 12, 20], 4)], prompt=2)
    assert row.sequences == [TokenizedSequence([BOS, 12, 20], 2)]
    assert cut([TokenizedSequence([BOS, 10, 20], 2)], prompt=1).sequences == [TokenizedSequence([BOS, 20], 1)]


def test_prompts_of_unequal_length_lose_the_same_tokens():
    row = cut([TokenizedSequence([10, 11, 12, 20], 3), TokenizedSequence([10, 11, 30, 31], 2)], prompt=2)
    assert row.sequences == [TokenizedSequence([11, 12, 20], 2), TokenizedSequence([11, 30, 31], 1)]


def test_prompts_too_unequal_for_one_cut_keep_a_token_each():
    row = cut([TokenizedSequence([10, 11, 12, 20], 3), TokenizedSequence([10, 30], 1)], prompt=1)
    assert row.sequences == [TokenizedSequence([12, 20], 1), TokenizedSequence([10, 30], 1)]


def test_limits_that_fit_cut_nothing():
    sequences = [TokenizedSequence([10, 11, 20, 21], 2)]
    row = cut(sequences, 2, 2)
    assert row.sequences == sequences
    assert (row.prompt_tokens_cut, row.num_truncated_responses, row.response_tokens_cut) == (0, 0, 0)


def test_what_is_not_scored_inside_a_response_moves_and_is_cut_with_it():
    sequence = TokenizedSequence([BOS, 10, 11, 20, 21, 22, 23, 24], 3, ((1, 3), (4, 5)))
    assert sequence.scored == [False, False, False, True, False, False, True, False]
    row = cut([sequence], prompt=2, response=4)
    assert row.sequences == [TokenizedSequence([BOS, 11, 20, 21, 22, 23], 2, ((1, 3),))]
    assert cut([sequence], response=2).sequences[0].scored == [False, False, False, True, False]


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(1, 7),
    st.integers(1, 7),
    st.booleans(),
)
def test_limits_hold_and_every_response_keeps_a_predictor(lengths, max_prompt, max_response, with_bos):
    sequences = [
        TokenizedSequence([BOS if with_bos else 10, *range(11, 10 + prompt), *range(50, 50 + response)], prompt)
        for prompt, response in lengths
    ]
    row = cut(sequences, max_prompt, max_response)
    for before, after in zip(sequences, row.sequences, strict=True):
        num_response = len(after.input_ids) - after.num_prompt_tokens
        assert 1 <= after.num_prompt_tokens <= max_prompt
        assert num_response == min(len(before.input_ids) - before.num_prompt_tokens, max_response)
        assert after.input_ids[after.num_prompt_tokens :] == list(range(50, 50 + num_response))
        assert (after.input_ids[0] == BOS) == with_bos


def test_loading_counts_what_it_cuts(tokenizer, write_jsonl):
    path = write_jsonl(
        {"prompt": "the quick brown", "responses": [" fox jumps over", " dog"]},
        {"prompt": "hello", "responses": [" world", " fox jumps"]},
    )
    dataset = load_preferences(path, tokenizer, DataOptions(max_prompt_tokens=2, max_response_tokens=2))
    report = dataset.report
    assert report is not None
    words = [[tokenizer.decode(sequence.input_ids) for sequence in group.sequences] for group in dataset]
    assert words == [
        [" quick brown fox jumps", " quick brown dog</s>"],
        ["hello world</s>", "hello fox jumps"],  # two response tokens fit, EOS does not
    ]
    assert (report.num_truncated_prompts, report.prompt_tokens_cut) == (1, 1)
    assert (report.num_truncated_responses, report.response_tokens_cut) == (2, 3)


def test_no_limits_by_default(tokenizer, write_jsonl):
    path = write_jsonl({"prompt": "hello " * 3000, "responses": ["world"]})
    dataset = load_preferences(path, tokenizer)
    assert dataset.lengths[0].total_tokens > 3000
    assert dataset.report is not None
    assert dataset.report.num_truncated_prompts == 0


def test_pair_that_truncation_makes_equal_is_a_bad_row(tokenizer, write_jsonl):
    path = write_jsonl({"prompt": "hello", "chosen": " world fox", "rejected": " world dog"})
    with pytest.raises(InputError, match=r":1: .*the same tokens after truncation; raise max_response_tokens"):
        load_preferences(path, tokenizer, DataOptions(max_response_tokens=1))


@pytest.mark.parametrize("options", [{"max_prompt_tokens": 0}, {"max_response_tokens": -1}, {"on_bad_row": "ignore"}])
def test_options_are_checked(options):
    with pytest.raises(InputError, match=next(iter(options))):
        DataOptions(**options)


def test_pair_that_the_tokenizer_makes_equal_is_a_bad_row(write_jsonl):
    core = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "hello": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    path = write_jsonl({"prompt": "hello", "chosen": " blue", "rejected": " green"})
    with pytest.raises(InputError, match=r":1: .*the same tokens; the tokenizer does not tell their texts apart"):
        load_preferences(path, tokenizer)
