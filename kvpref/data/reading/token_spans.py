"""Converts spans of characters to spans of tokens: a token is in a span if it holds any of its characters."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence

from kvpref.data.reading.response_spans import Span
from kvpref.prefix.radix import shared_prefix_length

Offsets = list[tuple[int, int]]
"""Characters [first, stop) of each token."""

TokenSpan = tuple[int, int | None]
"""Tokens [first, stop); stop is None if it cannot be told."""

BYTE_LEVEL_SPACE = "\u0120"
"""How byte-level tokenizers write a space inside a token."""


def spans_by_offsets(
    token_of: Callable[[int], object], num_chars: int, ids: list[int], offsets: Offsets, spans: AbstractSequence[Span]
) -> list[TokenSpan]:
    """Find spans by the offsets of a fast tokenizer.

    Args:
        token_of: Gives the vocabulary's token of an id.
        num_chars: Length of the text.
        ids: Token ids of the text.
        offsets: The tokens' characters.
        spans: Spans of characters.
    """

    def spaces(index: int, strip: Callable[[str, str], str]) -> tuple[int, bool]:
        token = str(token_of(ids[index]))
        letters = strip(token, BYTE_LEVEL_SPACE)
        return len(token) - len(letters), bool(letters)

    def first_after(place: int) -> int:
        if place == 0:
            return 0
        first = bisect_right(offsets, place, key=lambda span: span[1])
        if 0 < first < len(offsets) and offsets[first][0] > place:
            # Byte-level tokenizers with trim_offsets exclude a token's outer spaces from its offsets, so the token
            # before may hold the space that the response begins with. A token of only spaces keeps its true end.
            num_hidden, has_letters = spaces(first - 1, str.rstrip)
            if has_letters and offsets[first - 1][1] + num_hidden > place:
                return first - 1
        return first

    def first_from(place: int) -> int:
        if place == num_chars:
            return len(ids)
        first = bisect_left(offsets, place, key=lambda span: span[0])
        if first < len(offsets):
            # The same at a token's other side; the gap to the token before shows whether spaces were excluded.
            gap = offsets[first][0] - (offsets[first - 1][1] if first else 0)
            if offsets[first][0] - min(spaces(first, str.lstrip)[0], max(0, gap)) < place:
                return first + 1
        return first

    return [(first_after(start), first_from(end)) for start, end in spans]


def spans_by_beginnings(
    encode: Callable[[list[str]], list[list[int]]],
    texts: AbstractSequence[str],
    ids_of_texts: AbstractSequence[list[int]],
    spans_of_texts: AbstractSequence[AbstractSequence[Span]],
) -> list[list[TokenSpan]]:
    """Find spans without offsets, from the tokens of the text before each place, in one more call."""
    places = [
        sorted({place for span in spans for place in span} - {len(text)})
        for text, spans in zip(texts, spans_of_texts, strict=True)
    ]
    beginnings = iter(encode([text[:place] for text, own in zip(texts, places, strict=True) for place in own]))
    found = []
    for text, ids, spans, own in zip(texts, ids_of_texts, spans_of_texts, places, strict=True):
        encoded = {place: next(beginnings) for place in own} | {len(text): ids}
        # If the tokens of a beginning differ from those of the whole, one token holds both sides.
        shared = {place: shared_prefix_length(ids, beginning) for place, beginning in encoded.items()}
        found.append(
            [(shared[start], shared[end] if shared[end] == len(encoded[end]) else None) for start, end in spans]
        )
    return found
