"""Both ends of a span: a token that holds any of its characters is in it, whatever the tokenizer's offsets hide."""

from __future__ import annotations

import itertools
import random

import pytest

from kvpref.data.reading.token_spans import spans_by_beginnings, spans_by_offsets


def encode(tokenizer, text):
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoding["input_ids"], encoding["offset_mapping"]


def find(tokenizer, text, spans):
    ids, offsets = encode(tokenizer, text)
    return ids, spans_by_offsets(tokenizer.convert_ids_to_tokens, len(text), ids, offsets, spans)


def true_extents(tokenizer, ids):
    """Where each token begins and ends in the text, from the tokens themselves (one character per byte)."""
    ends = [0]
    for token in tokenizer.convert_ids_to_tokens(ids):
        ends.append(ends[-1] + len(token))
    return list(itertools.pairwise(ends))


@pytest.mark.parametrize("name", ["tokenizer", "space_trimming_tokenizer"])
def test_spans_of_ascii_texts_hold_exactly_the_tokens_that_touch_them(name, request):
    tokenizer = request.getfixturevalue(name)
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(generator.choice(["hello", "o", " ", "  ", "the ", "x", "fox"]) for _ in range(8))
        start = generator.randrange(len(text))
        end = generator.randrange(start, len(text)) + 1
        ids, [(first, last)] = find(tokenizer, text, [(start, end)])
        touching = [
            index for index, (begin, stop) in enumerate(true_extents(tokenizer, ids)) if begin < end and stop > start
        ]
        assert list(range(first, last)) == touching, (text, start, end)


def test_a_character_of_several_tokens_is_whole(tokenizer):
    ids, [(first, last)] = find(tokenizer, "a😀b", [(1, 2)])
    assert tokenizer.decode(ids[first:last]) == "😀"


def test_without_offsets_the_beginnings_are_compared(slow_tokenizer):
    def spans_of(text, *spans):
        ids = slow_tokenizer(text, add_special_tokens=False)["input_ids"]
        batch = lambda texts: slow_tokenizer(texts, add_special_tokens=False)["input_ids"]  # noqa: E731
        return spans_by_beginnings(batch, [text], [ids], [spans])[0]

    assert spans_of("d ab f", (2, 4), (5, 6)) == [(2, 3), (4, 5)]
    # "abc" is one token: what begins inside it has it; where what ends inside it ends cannot be told.
    assert spans_of("d abc f", (4, 7)) == [(2, 5)]
    assert spans_of("d abc f", (2, 4)) == [(2, None)]
