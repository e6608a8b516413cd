"""Small tokenizers made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

SENTENCES = [
    "hello world hello world hello world",
    "the quick brown fox jumps over the lazy dog",
    "what is the capital of france? the capital of france is paris.",
    "user assistant system answer question prompt response",
] * 3

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_byte_level_tokenizer(
    *,
    bos: bool = True,
    eos: bool = True,
    pad_is_eos: bool = False,
    adds_bos: bool = False,
    adds_eos: bool = False,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens and defaults asked for."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if adds_bos or adds_eos:
        template = [name for name, wanted in (("<s>", adds_bos), ("$A", True), ("</s>", adds_eos)) if wanted]
        core.post_processor = processors.TemplateProcessing(
            single=" ".join(template), special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
        pad_token="</s>" if pad_is_eos else "<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=chat_template,
    )


@pytest.fixture(scope="session")
def space_trimming_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, but "o " and "  " are one each, with outer spaces left out of the offsets."""
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "o\u0120", "\u0120\u0120"]
    merges = [("o", "\u0120"), ("\u0120", "\u0120")]
    core = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=True)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


class LongestMatchTokenizer(PreTrainedTokenizer):
    """A slow tokenizer: no offsets. It takes the longest known piece, so "ab" + "c" and "abc" differ."""

    pieces = ("<s>", "</s>", "abc", "ab", "bc", *"abcdef ")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(bos_token="<s>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return {piece: index for index, piece in enumerate(self.pieces)}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        tokens = []
        while text:
            tokens.append(next(piece for piece in self.pieces if text.startswith(piece)))
            text = text[len(tokens[-1]) :]
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces[index]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """BOS and EOS exist and are not added by default; no chat template."""
    return build_byte_level_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With a ChatML template; EOS is </s>, which the template does not write."""
    return build_byte_level_tokenizer(chat_template=CHATML)


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes a byte-level tokenizer with other special tokens, defaults or template."""
    return build_byte_level_tokenizer


@pytest.fixture(scope="session")
def chat_template() -> str:
    """ChatML."""
    return CHATML


@pytest.fixture(scope="session")
def slow_tokenizer() -> PreTrainedTokenizer:
    """Without offsets."""
    return LongestMatchTokenizer()


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows (objects, or raw strings and bytes) to a JSON lines file; returns its path."""

    def write(*rows: object, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [
            row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
            for row in rows
        ]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return write
