"""Texts to tokens: every whole text is tokenized at once, and the response is found in the result.

tokens(prompt) + tokens(response) can differ from tokens(prompt + response), so neither is ever tokenized alone and
joined: a token that holds any character of the response is the response's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpref.data.lengths import num_shared
from kvpref.data.messages import RowError
from kvpref.data.rendering import RenderedRow
from kvpref.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Offsets = list[tuple[int, int]]
BYTE_LEVEL_SPACE = "\u0120"
"""How byte-level tokenizers write a space inside a token."""


@dataclass(frozen=True)
class TokenizedSequence:
    """Token ids of a prompt and its response; the first `num_prompt_tokens` are the prompt's."""

    input_ids: list[int]
    num_prompt_tokens: int


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or by its hub name.

    Raises:
        InputError: If there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises errors of many classes for a name it cannot serve
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

    def tokenize(self, rows: AbstractSequence[RenderedRow]) -> list[list[TokenizedSequence] | RowError]:
        """Tokenize all texts of the rows in one call; a row that cannot be used comes back as its error."""
        texts = [text for row in rows for text in row.texts]
        ids_of_texts, offsets_of_texts = self._encode(texts)
        starts = self._response_starts(rows, ids_of_texts, offsets_of_texts)
        results: list[list[TokenizedSequence] | RowError] = []
        begin = 0
        for row in rows:
            end = begin + len(row.texts)
            try:
                results.append(self._finish(row, ids_of_texts[begin:end], starts[begin:end]))
            except RowError as error:
                results.append(error)
            begin = end
        return results

    def _encode(self, texts: list[str]) -> tuple[list[list[int]], list[Offsets] | None]:
        encoding = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=self.tokenizer.is_fast,
            verbose=False,
        )
        return encoding["input_ids"], encoding.get("offset_mapping")

    def _response_starts(
        self,
        rows: AbstractSequence[RenderedRow],
        ids_of_texts: list[list[int]],
        offsets_of_texts: list[Offsets] | None,
    ) -> list[int]:
        """Index of the first token of each response; 0 where the row's texts must be compared to find it."""
        texts = [text for row in rows for text in row.texts]
        prompt_chars = [count for row in rows for count in row.prompt_chars or (0,) * len(row.texts)]
        if offsets_of_texts is None:
            prompts = [text[:count] for text, count in zip(texts, prompt_chars, strict=True)]
            pairs = zip(ids_of_texts, self._encode(prompts)[0], strict=True)
            return [num_shared(whole, prompt) for whole, prompt in pairs]
        return [
            self._first_response_token(ids, offsets, count)
            for ids, offsets, count in zip(ids_of_texts, offsets_of_texts, prompt_chars, strict=True)
        ]

    def _first_response_token(self, ids: list[int], offsets: Offsets, prompt_chars: int) -> int:
        first = bisect_right(offsets, prompt_chars, key=lambda span: span[1])
        if 0 < first < len(offsets) and offsets[first][0] > prompt_chars:
            # Byte-level tokenizers with trim_offsets leave a token's outer spaces out of its span, so the token
            # before may hold the space that the response begins with. A token of spaces alone keeps its true end.
            token = str(self.tokenizer.convert_ids_to_tokens(ids[first - 1]))
            letters = token.rstrip(BYTE_LEVEL_SPACE)
            if letters and offsets[first - 1][1] + len(token) - len(letters) > prompt_chars:
                return first - 1
        return first

    def _finish(self, row: RenderedRow, ids_of_texts: list[list[int]], starts: list[int]) -> list[TokenizedSequence]:
        """Add BOS and EOS where they belong, and check that every response has a token and a predictor."""
        if any(start >= len(ids) for ids, start in zip(ids_of_texts, starts, strict=True)):
            raise RowError("a response is empty: the tokenizer makes no token of it")
        sequences = []
        for text, ids, start in zip(row.texts, ids_of_texts, starts, strict=True):
            leading = self._leading_ids_for(row, ids)
            sequences.append(TokenizedSequence([*leading, *ids, *self._ending(row, text, ids)], len(leading) + start))
        if row.prompt_chars is None:
            sequences = _share_prompt(sequences)
        if all(sequence.num_prompt_tokens for sequence in sequences):
            return sequences
        if self.bos_token_id is None:
            raise RowError(
                "a response starts at the very first token, and the tokenizer has no BOS token to predict it from; "
                "give a longer prompt, or set tokenizer.bos_token"
            )
        # All sequences of the row get it, so that they still begin alike.
        return [
            TokenizedSequence([self.bos_token_id, *sequence.input_ids], sequence.num_prompt_tokens + 1)
            for sequence in sequences
        ]

    def _find_leading_ids(self) -> list[int]:
        """What the tokenizer puts before a text by default (BOS, mostly). What it puts after one is left to us."""
        plain = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        default = list(self.tokenizer("a")["input_ids"])
        for index in range(len(default) - len(plain) + 1):
            if default[index : index + len(plain)] == plain:
                return default[:index]
        return []

    def _leading_ids_for(self, row: RenderedRow, ids: list[int]) -> list[int]:
        # Chat templates write their own; a plain text may have been written with BOS in it.
        if row.is_chat or ids[: len(self.leading_ids)] == self.leading_ids:
            return []
        return self.leading_ids

    def _ending(self, row: RenderedRow, text: str, ids: list[int]) -> list[int]:
        if self.eos_token_id is None or ids[-1] == self.eos_token_id:
            return []
        # A template ends the turn in its own way, often with a newline after the token that does it.
        if row.is_chat and text.rstrip().endswith(self._end_tokens):
            return []
        return [self.eos_token_id]


def _share_prompt(sequences: list[TokenizedSequence]) -> list[TokenizedSequence]:
    num_prompt_tokens = num_shared(sequences[0].input_ids, sequences[1].input_ids)
    if any(num_prompt_tokens == len(sequence.input_ids) for sequence in sequences):
        raise RowError("`chosen` and `rejected` do not differ after their common beginning; add a `prompt` field")
    return [TokenizedSequence(sequence.input_ids, num_prompt_tokens) for sequence in sequences]
