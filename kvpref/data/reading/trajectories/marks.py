"""What a chat template marks as generated: ``{% generation %}`` blocks, as reported by transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from itertools import groupby
from typing import Any

from kvpref.data.reading.messages import Message, TemplateRefusalError
from kvpref.data.reading.response_spans import ChatTemplate, Span, in_parts

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the same pattern as in transformers


def marks_generation(template: ChatTemplate) -> bool:
    """Whether the template marks what the model generates, in a way that can be read.

    Reading the marks needs the offsets of a fast tokenizer, and the tokenizer's own template.
    """
    if template.processor is not None or not template.tokenizer.is_fast:
        return False
    return any(_GENERATION.search(source) for source in template.sources())


def find_marked(template: ChatTemplate, messages: AbstractSequence[Message], text: str) -> tuple[Span, ...]:
    """The runs of characters that the template marks as generated (transformers' `return_assistant_tokens_mask`).

    Args:
        template: A template for which `marks_generation` is true.
        messages: A conversation.
        text: The template's output for it.

    Raises:
        TemplateRefusalError: If the template refuses it.
    """
    turns = list(map(in_parts, messages)) if template.reads_parts_only else list(messages)
    try:
        marked: Any = template.tokenizer.apply_chat_template(
            turns,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
            **template.settings,
        )
    except Exception as error:  # as in ChatTemplate.write
        raise TemplateRefusalError(f"the chat template refuses the messages ({error})") from error
    return tuple(_runs(marked["assistant_masks"], marked["offset_mapping"], len(text)))


def _runs(mask: AbstractSequence[int], offsets: AbstractSequence[tuple[int, int]], num_chars: int) -> Iterator[Span]:
    """Runs of marked tokens, as characters."""
    for is_marked, run in groupby(range(len(mask)), key=lambda index: bool(mask[index])):
        if is_marked:
            first, *_ = indices = list(run)
            yield offsets[first][0], min(num_chars, offsets[indices[-1]][1])
