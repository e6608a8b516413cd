"""Rows to texts: where each whole text comes from, and where in it the response begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvpref.data.lengths import num_shared
from kvpref.data.messages import Message, RowError
from kvpref.data.rows import PreferenceRow
from kvpref.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RenderedRow:
    """The texts of one row.

    Args:
        row: The row that was rendered.
        texts: Prompt and response together, one text per response.
        prompt_chars: Per text, how many of its characters are the prompt; None where the prompt is what the tokens
            of the texts have in common.
        is_chat: True where a chat template wrote the texts, special tokens included.
    """

    row: PreferenceRow
    texts: tuple[str, ...]
    prompt_chars: tuple[int, ...] | None
    is_chat: bool


def render_row(row: PreferenceRow, tokenizer: PreTrainedTokenizerBase) -> RenderedRow:
    """Write out the texts of one row.

    Raises:
        RowError: If the chat template refuses the messages, or writes nothing for a response.
        InputError: If the row holds messages and the tokenizer has no chat template.
    """
    if isinstance(row.prompt, tuple):
        return _render_chat(row, row.prompt, tokenizer)
    texts = tuple(f"{row.prompt or ''}{response}" for response in row.responses)
    prompt_chars = None if row.prompt is None else (len(row.prompt),) * len(texts)
    return RenderedRow(row, texts, prompt_chars, is_chat=False)


def _render_chat(row: PreferenceRow, prompt: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase) -> RenderedRow:
    if not tokenizer.chat_template:
        raise InputError(
            "the row holds chat messages, and the tokenizer has no chat template; use the tokenizer of a chat model, "
            "set tokenizer.chat_template, or write the rows as plain strings"
        )
    prompt_text = _apply_template(prompt, tokenizer, add_generation_prompt=True)
    texts, prompt_chars = [], []
    for response in row.responses:
        text = _apply_template((*prompt, *response), tokenizer, add_generation_prompt=False)
        # Templates may write the prompt differently once an answer follows (an empty thinking block, say).
        shared = len(prompt_text) if text.startswith(prompt_text) else num_shared(prompt_text, text)
        if shared == len(text):
            raise RowError("a response is empty: the chat template writes nothing for it")
        texts.append(text)
        prompt_chars.append(shared)
    return RenderedRow(row, tuple(texts), tuple(prompt_chars), is_chat=True)


def _apply_template(
    messages: tuple[Any, ...], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program: besides jinja's own errors it can raise anything
        raise RowError(f"the chat template refuses the messages ({error})") from error
    return str(text)
