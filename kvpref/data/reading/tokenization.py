"""Tokenizes texts: every text is tokenized as a whole, and the response is located in the result.

tokens(prompt) + tokens(response) can differ from tokens(prompt + response), so they are never tokenized separately and
joined: a token that holds any character of the response belongs to the response. The same holds at both ends of each
assistant turn in a response of several.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from kvpref.data.reading.images.store import StoredImage
from kvpref.data.reading.messages import RowError
from kvpref.data.reading.response_spans import Span
from kvpref.data.reading.token_spans import Offsets, TokenSpan, spans_by_beginnings, spans_by_offsets
from kvpref.errors import InputError
from kvpref.prefix.radix import shared_prefix_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RenderedTexts(Protocol):
    """The texts of one row; see `RenderedRow` and `RenderedTask`."""

    @property
    def texts(self) -> tuple[str, ...]: ...

    @property
    def spans(self) -> tuple[tuple[Span, ...], ...] | None: ...

    @property
    def is_chat(self) -> bool: ...

    @property
    def images(self) -> tuple[StoredImage, ...]: ...


@dataclass(frozen=True)
class TokenizedSequence:
    """Token ids of a prompt and its response.

    Args:
        input_ids: Token ids of both; the first `num_prompt_tokens` are the prompt's.
        num_prompt_tokens: Number of tokens before the first scored one.
        unscored: Spans of the response, counted from its first token, that are not scored: messages of tools and
            users inside it, with everything that the template writes around them.
    """

    input_ids: list[int]
    num_prompt_tokens: int
    unscored: tuple[Span, ...] = ()

    @property
    def scored(self) -> list[bool]:
        """One flag per token."""
        flags = [False] * self.num_prompt_tokens + [True] * (len(self.input_ids) - self.num_prompt_tokens)
        for start, end in self.unscored:
            span = slice(self.num_prompt_tokens + start, self.num_prompt_tokens + end)
            flags[span] = [False] * len(flags[span])
        return flags


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or by its hub name.

    Raises:
        InputError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises errors of many classes for a name it cannot load
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name}: no tokenizer can be loaded ({reason}); check the folder or the name") from error


class SequenceTokenizer:
    """Tokenizes rendered rows in batches with one tokenizer's conventions.

    Args:
        tokenizer: Any Hugging Face tokenizer; one without offsets (a slow one) costs a second call per batch.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.leading_ids = self._find_leading_ids()
        self._end_tokens = tuple(
            {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
            | set(tokenizer.all_special_tokens)
        )

    def tokenize(self, rows: AbstractSequence[RenderedTexts]) -> list[list[TokenizedSequence] | RowError]:
        """Tokenize all texts of the rows in one call; for a row that cannot be used, its error is returned."""
        texts = [text for row in rows for text in row.texts]
        ids_of_texts, offsets_of_texts = self._encode(texts)
        spans = self._token_spans(rows, ids_of_texts, offsets_of_texts)
        results: list[list[TokenizedSequence] | RowError] = []
        begin = 0
        for row in rows:
            end = begin + len(row.texts)
            try:
                results.append(self._finish(row, ids_of_texts[begin:end], spans[begin:end]))
            except RowError as error:
                results.append(error)
            begin = end
        return results

    def _encode(self, texts: list[str]) -> tuple[list[list[int]], list[Offsets] | None]:
        if not texts:
            return [], [] if self.tokenizer.is_fast else None
        encoding = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=self.tokenizer.is_fast,
            verbose=False,
        )
        return encoding["input_ids"], encoding.get("offset_mapping")

    def _token_spans(
        self,
        rows: AbstractSequence[RenderedTexts],
        ids_of_texts: list[list[int]],
        offsets_of_texts: list[Offsets] | None,
    ) -> list[list[TokenSpan]]:
        """The scored spans of each text in tokens; the whole text if the row's texts must be compared to find them."""
        texts = [text for row in rows for text in row.texts]
        spans = [own for row in rows for own in row.spans or [((0, len(text)),) for text in row.texts]]
        if offsets_of_texts is None:
            return spans_by_beginnings(lambda parts: self._encode(parts)[0], texts, ids_of_texts, spans)
        return [
            spans_by_offsets(self.tokenizer.convert_ids_to_tokens, len(text), ids, offsets, own)
            for text, ids, offsets, own in zip(texts, ids_of_texts, offsets_of_texts, spans, strict=True)
        ]

    def _finish(
        self, row: RenderedTexts, ids_of_texts: list[list[int]], spans_of_texts: list[list[TokenSpan]]
    ) -> list[TokenizedSequence]:
        """Add BOS and EOS where they belong, and check that every response has a token and a predictor."""
        if any(spans[0][0] >= len(ids) for ids, spans in zip(ids_of_texts, spans_of_texts, strict=True)):
            raise RowError("a response is empty: the tokenizer makes no tokens from it")
        if any(end is None for spans in spans_of_texts for _, end in spans):
            raise RowError(
                "the tokenizer joins the end of a turn inside a response with what follows it, and has no offsets to "
                "tell them apart; use a fast tokenizer"
            )
        sequences = []
        for text, ids, spans in zip(row.texts, ids_of_texts, spans_of_texts, strict=True):
            leading = self._leading_ids_for(row, ids)
            # EOS ends the assistant's turn, and only that.
            ending = self._ending(row, text, ids) if spans[-1][1] == len(ids) else []
            sequences.append(
                TokenizedSequence(
                    [*leading, *ids, *ending], len(leading) + spans[0][0], tuple(_gaps(spans, num_tokens=len(ids)))
                )
            )
        if row.spans is None:
            sequences = _share_prompt(sequences, {*self.leading_ids, self.bos_token_id})
        if all(sequence.num_prompt_tokens for sequence in sequences):
            return sequences
        if self.bos_token_id is None:
            raise RowError(
                "a response starts at the very first token, and the tokenizer has no BOS token to predict it from; "
                "give a longer prompt, or set tokenizer.bos_token"
            )
        # All sequences of the row get it, so that they still begin alike.
        return [
            replace(
                sequence,
                input_ids=[self.bos_token_id, *sequence.input_ids],
                num_prompt_tokens=sequence.num_prompt_tokens + 1,
            )
            for sequence in sequences
        ]

    def _find_leading_ids(self) -> list[int]:
        """The ids that the tokenizer puts before a text by default (mostly BOS). Ids after a text are handled here."""
        plain = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        default = list(self.tokenizer("a")["input_ids"])
        for index in range(len(default) - len(plain) + 1):
            if default[index : index + len(plain)] == plain:
                return default[:index]
        return []

    def _leading_ids_for(self, row: RenderedTexts, ids: list[int]) -> list[int]:
        # Chat templates write their own; if a template does not, processors leave it to the tokenizer. A plain text may
        # already contain BOS.
        if (row.is_chat and not row.images) or ids[: len(self.leading_ids)] == self.leading_ids:
            return []
        return self.leading_ids

    def _ending(self, row: RenderedTexts, text: str, ids: list[int]) -> list[int]:
        if self.eos_token_id is None or ids[-1] == self.eos_token_id:
            return []
        # A template ends the turn in its own way, often with a newline after the token that does it.
        if row.is_chat and text.rstrip().endswith(self._end_tokens):
            return []
        return [self.eos_token_id]


def _share_prompt(sequences: list[TokenizedSequence], leading: set[int | None]) -> list[TokenizedSequence]:
    """Take the common tokens as the prompt, not counting the `leading` ones that begin every text."""
    num_prompt_tokens = shared_prefix_length(sequences[0].input_ids, sequences[1].input_ids)
    if leading.issuperset(sequences[0].input_ids[:num_prompt_tokens]):
        raise RowError(
            "`chosen` and `rejected` have no common beginning, so there is no prompt; add a `prompt` field "
            "(an empty one if there is none)"
        )
    if any(num_prompt_tokens == len(sequence.input_ids) for sequence in sequences):
        raise RowError("`chosen` and `rejected` do not differ after their common beginning; add a `prompt` field")
    return [TokenizedSequence(sequence.input_ids, num_prompt_tokens) for sequence in sequences]


def _gaps(spans: list[TokenSpan], *, num_tokens: int) -> Iterator[Span]:
    """The gaps between spans and after the last, counted from the start of the first span."""
    begin = spans[0][0]
    afters = [start for start, _ in spans[1:]]
    for (_, end), after in zip(spans, [*afters, num_tokens], strict=True):
        if end is not None and end < after:
            yield end - begin, after - begin
