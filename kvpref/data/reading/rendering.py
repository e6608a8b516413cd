"""Rows to texts: where each whole text comes from, and which of its characters are scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from kvpref.data.reading.images.parts import place_images
from kvpref.data.reading.images.store import StoredImage
from kvpref.data.reading.lost_parts import check_nothing_lost, check_prompt_written
from kvpref.data.reading.messages import Message, RowError
from kvpref.data.reading.response_spans import ChatTemplate, Messages, Span, chat_template_of, find_spans
from kvpref.data.reading.roles import check_roles
from kvpref.data.reading.rows import PreferenceRow
from kvpref.data.reading.template_probes import TemplateProbes
from kvpref.errors import InputError


@dataclass(frozen=True)
class RenderedRow:
    """The texts of one row.

    Args:
        row: The row that was rendered.
        texts: Prompt and response together, one text per response.
        spans: Per text, which of its characters are scored: the response, or each assistant turn of it, in order. The
            first begins where the prompt ends. None where the prompt is what the tokens of the texts have in common.
        is_chat: True where a chat template wrote the texts, special tokens included.
        images: Those of the prompt, in the order of their placeholders in each text.
    """

    row: PreferenceRow
    texts: tuple[str, ...]
    spans: tuple[tuple[Span, ...], ...] | None
    is_chat: bool
    images: tuple[StoredImage, ...] = ()


def render_row(row: PreferenceRow, tokenizer: Any, probes: TemplateProbes | None = None) -> RenderedRow:
    """Write out the texts of one row.

    Args:
        row: The row.
        tokenizer: Or a processor; has the chat template.
        probes: What is known of this tokenizer's template from other rows.

    Raises:
        RowError: If the chat template refuses the messages, leaves out what prompt, tools or response say, does not
            know a setting, or writes a response so that its beginning cannot be told; if a response does not begin
            with an assistant turn.
        InputError: If the row holds messages and the tokenizer has no chat template.
    """
    template = chat_template_of(tokenizer)
    prompt = row.prompt
    if row.images and isinstance(prompt, str):
        row, prompt = _with_places(row, prompt, tokenizer, has_template=bool(template.program))
    if isinstance(prompt, tuple):
        return _render_chat(row, prompt, template, probes or TemplateProbes())
    texts = tuple(f"{prompt or ''}{response}" for response in row.responses)
    if prompt is None:
        return RenderedRow(row, texts, None, is_chat=False)
    return RenderedRow(row, texts, tuple(((len(prompt), len(text)),) for text in texts), is_chat=False)


def _with_places(
    row: PreferenceRow, prompt: str, processor: Any, *, has_template: bool
) -> tuple[PreferenceRow, str | Messages]:
    """The row of texts and the prompt, with a place for each image: in front of the text, if it has none."""
    token = getattr(processor, "image_token", None) or "<image>"
    if token in prompt:
        return row, prompt
    if not has_template:
        return row, token * len(row.images) + prompt
    placed, _ = place_images(({"role": "user", "content": prompt},), (), row.images)
    assert isinstance(placed, tuple)
    answers = tuple(({"role": "assistant", "content": response},) for response in row.responses)
    return replace(row, prompt=placed, responses=answers, is_asked_by_user=True), placed


def _render_chat(row: PreferenceRow, prompt: Messages, template: ChatTemplate, probes: TemplateProbes) -> RenderedRow:
    if not template.program:
        raise InputError(
            "the row holds chat messages, and the tokenizer has no chat template; use the tokenizer of a chat model, "
            "set tokenizer.chat_template, or write the rows as plain strings"
        )
    responses = tuple(response for response in row.responses if not isinstance(response, str))
    names = _names(row)
    for response, name in zip(responses, names, strict=True):
        if response[0]["role"] != "assistant":
            raise RowError(
                f"{name} begins with a turn of role {response[0]['role']!r}, and a response must begin with one of "
                "role 'assistant'; correct the role, or move the turns before the answer to the prompt"
            )
    template = replace(
        template, settings=dict(row.template_settings), reads_parts_only=probes.reads_parts_only(template)
    )
    probes.check_settings(template)
    check_roles(template, prompt, "the prompt")
    for response, name in zip(responses, names, strict=True):
        check_roles(template, response, name)
    first_error: RowError | None = None
    for form in _forms((prompt, *responses)):
        try:
            texts, spans = find_spans(template, form[0], form[1:], names)
            check_prompt_written(prompt, row.template_settings.get("tools", ()), texts[0])
            for response, text, own, name in zip(form[1:], texts, spans, names, strict=True):
                check_nothing_lost(response, text, own, name)
                probes.check_written(template, form[0], response, name)
        except RowError as error:
            first_error = first_error or error
        else:
            return RenderedRow(row, texts, spans, is_chat=True)
    assert first_error is not None
    raise first_error


def _forms(conversations: tuple[Messages, ...]) -> Iterator[tuple[Messages, ...]]:
    """The messages, and again with null (to which transformers drops the key) in the place of empty content: some
    templates tell messages that only call tools by it."""
    yield conversations
    if any(_has_only_calls(message) for messages in conversations for message in messages):
        yield tuple(
            tuple(message | {"content": None} if _has_only_calls(message) else message for message in messages)
            for messages in conversations
        )


def _has_only_calls(message: Message) -> bool:
    return bool(message.get("tool_calls")) and not message["content"]


def _names(row: PreferenceRow) -> tuple[str, ...]:
    return row.names or tuple(f"`responses[{index}]`" for index in range(len(row.responses)))
