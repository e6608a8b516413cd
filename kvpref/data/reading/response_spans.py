"""Locates the assistant's turns of a response in a chat template's output.

Only the template knows, so it is tested: with the generation prompt, with the beginning of a conversation without the
turn, and with marker texts in place of the turn's content.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvpref.data.reading.lost_parts import parts_of
from kvpref.data.reading.messages import REASONING_FIELDS, Message, RowError, TemplateRefusalError
from kvpref.prefix.radix import shared_prefix_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Characters [first, stop)."""

Messages = tuple[Message, ...]

# The common beginning and end of two texts with different markers lie exactly around the content.
MARKERS = ("alpha", "omega!")
NUM_QUOTED_CHARS = 24


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's or processor's chat template.

    Args:
        tokenizer: The tokenizer, whose special tokens it writes.
        settings: Further keyword arguments of every call, such as ``tools``.
        processor: The processor that owns the template, if not the tokenizer.
        reads_parts_only: Whether text content is passed to it as a list of one part.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any] = field(default_factory=dict)
    processor: Any = None
    reads_parts_only: bool = False

    @property
    def _owner(self) -> Any:
        return self.tokenizer if self.processor is None else self.processor

    def write(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The text of some messages.

        Raises:
            TemplateRefusalError: If the template refuses them.
        """
        turns = list(map(in_parts, messages)) if self.reads_parts_only else list(messages)
        try:
            text = self._owner.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt, **self.settings
            )
        except Exception as error:  # a template is a program: it can raise anything, not only jinja's errors
            raise TemplateRefusalError(f"the chat template refuses the messages ({error})") from error
        return str(text)

    @property
    def program(self) -> Any:
        """The template itself; a dict if there are several, None if there is none."""
        return self._owner.chat_template

    def sources(self) -> tuple[str, ...]:
        """The program as text; several if the tokenizer has several templates."""
        template = self.program
        return tuple(map(str, template.values() if isinstance(template, dict) else (template,)))

    def special_tokens(self) -> set[str]:
        """Special tokens, such as those that end turns."""
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return added | set(self.tokenizer.all_special_tokens)


def tokenizer_of(given: Any) -> Any:
    """The tokenizer itself, or a processor's tokenizer."""
    # Some tokenizers have another one as `tokenizer`.
    return given if hasattr(given, "convert_tokens_to_ids") else getattr(given, "tokenizer", given)


def chat_template_of(given: Any) -> ChatTemplate:
    """The template of a tokenizer or processor; a processor may leave it to its tokenizer."""
    tokenizer = tokenizer_of(given)
    has_own = tokenizer is not given and getattr(given, "chat_template", None)
    return ChatTemplate(tokenizer, processor=given if has_own else None)


def in_parts(message: Message) -> Message:
    """A message with text content as a list of one part."""
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def find_spans(
    template: ChatTemplate, prompt: Messages, responses: AbstractSequence[Messages], names: AbstractSequence[str]
) -> tuple[tuple[str, ...], tuple[tuple[Span, ...], ...]]:
    """Write out the conversations of one row, and find the assistant's turns of the responses in them.

    Args:
        template: Writes the messages.
        prompt: The common messages before the responses, not empty.
        responses: The turns of each response; the first is the assistant's.
        names: The responses' names in errors.

    Returns:
        One text per response, and its spans: one per assistant turn, each from the first character after what the
        template writes to ask for the turn. The first begins at the same character in all texts.

    Raises:
        RowError: If the template refuses messages, writes nothing for a turn, or writes what is before the turn
            differently once the turn follows.
    """
    texts = tuple(template.write((*prompt, *response)) for response in responses)
    first_start = _find_start(template, prompt, responses, texts, "the answer")
    spans = []
    for response, text, name in zip(responses, texts, names, strict=True):
        found: list[Span] = []
        for index, turn in enumerate(response):
            if turn["role"] != "assistant":
                continue
            before, after = (*prompt, *response[:index]), response[index + 1 :]
            place = f"turn {index + 1} of {name}"
            start = _find_start(template, before, (response[index:],), (text,), place) if index else first_start
            end = _find_end(template, before, turn, after, text, place) if after else len(text)
            if start >= end or (found and start < found[-1][1]):
                raise RowError(f"a response is empty: the chat template writes nothing for it ({place})")
            found.append((start, end))
        spans.append(tuple(found))
    return texts, tuple(spans)


def _find_start(
    template: ChatTemplate,
    before: Messages,
    continuations: AbstractSequence[Messages],
    texts: AbstractSequence[str],
    place: str,
) -> int:
    """Where the turn after some messages begins, the same in all texts."""
    asked = template.write(before, add_generation_prompt=True)
    if all(text.startswith(asked) for text in texts):
        return len(asked)
    # The generation prompt may go on into the answer (a `<think>` that this answer has not): then the turn begins
    # where its content does. What is before that may depend on whether other turns follow.
    alone = _around_content(template, before, {"role": "assistant"}, (), _common_beginning)
    starts = []
    for turns, text in zip(continuations, texts, strict=True):
        header: str | None = asked if text.startswith(asked) else alone
        if not _is_beginning(header, asked, text):
            header = _around_content(template, before, _without_reasoning(turns[0]), turns[1:], _common_beginning)
        if header is None or not _is_beginning(header, asked, text):
            raise RowError(
                f"the chat template writes the text before {place} differently once {place} follows: "
                f"{_quote_difference(asked, text)}; use a template that writes the same before and after, or set "
                "what it reads (`chat_template_kwargs`, such as enable_thinking) to fit the data"
            )
        starts.append(len(header))
    return min(starts)


def _is_beginning(header: str | None, *texts: str) -> bool:
    return header is not None and all(text.startswith(header) for text in texts)


def _without_reasoning(turn: Message) -> Message:
    return {key: value for key, value in turn.items() if key not in REASONING_FIELDS}


def _find_end(template: ChatTemplate, before: Messages, turn: Message, after: Messages, text: str, place: str) -> int:
    """Where an assistant turn that is followed by others ends."""
    try:
        alone = template.write((*before, turn))
    except RowError:
        alone = None
    if alone is not None and text.startswith(alone):
        return len(alone)
    inserted = None if alone is None else _end_without_insertion(turn, alone, text)
    if inserted is not None:
        return inserted
    # The last turn ends differently from earlier ones. What follows its content is compared.
    rest = _around_content(template, before, turn, after, _common_ending)
    last_rest = _around_content(template, before, turn, (), _common_ending)
    num_own = None if rest is None or last_rest is None else _length_of_ending(template, rest, last_rest)
    if rest is None or num_own is None or not text.endswith(rest[num_own:]):
        found = "" if alone is None else f": {_quote_difference(alone, text)}"
        raise RowError(
            f"the chat template writes {place} differently once other turns follow, so its end cannot be "
            f"told{found}; let the response end with this turn, or use another template"
        )
    return len(text) - len(rest) + num_own


def _end_without_insertion(turn: Message, alone: str, text: str) -> int | None:
    """Where a turn ends that only lacks something that the last turn has before its content: empty thinking, say."""
    shared = shared_prefix_length(alone, text)
    rest, found = alone[shared:], text[shared : shared + len(alone)]
    own = next(
        (rest[start:] for start in range(len(rest)) if rest[start] == found[:1] and found.startswith(rest[start:])), ""
    )
    parts = [value for _, value in parts_of(turn)]
    return shared + len(own) if any(parts) and all(value in own for value in parts) else None


def _length_of_ending(template: ChatTemplate, rest: str, last_rest: str) -> int | None:
    """How much of the text after a turn's content belongs to the turn, judging by its end as the last turn."""
    if rest.startswith(last_rest):
        return len(last_rest)
    # Some families end the last turn with a different token, some write one more after it.
    tokens = tuple(template.special_tokens())
    for start in range(shared_prefix_length(rest, last_rest) + 1):
        own = max((token for token in tokens if rest.startswith(token, start)), key=len, default="")
        last = max((token for token in tokens if last_rest.startswith(token, start)), key=len, default="")
        if own == last:
            continue
        if not last or last_rest[start + len(last) :].strip():
            return None
        if rest[:start].rstrip().endswith(tokens):
            return start
        return start + len(own) if own else None
    return None


def _around_content(
    template: ChatTemplate, before: Messages, turn: Message, after: Messages, common: Callable[[str, str], str]
) -> str | None:
    """What the template writes before (or after) the content of a turn; None if it does not write the content."""
    try:
        first, second = (template.write((*before, turn | {"content": marker}, *after)) for marker in MARKERS)
    except RowError:
        return None
    return None if first == second else common(first, second)


def _common_beginning(first: str, second: str) -> str:
    return first[: shared_prefix_length(first, second)]


def _common_ending(first: str, second: str) -> str:
    return first[len(first) - shared_prefix_length(first[::-1], second[::-1]) :]


def _quote_difference(asked: str, text: str) -> str:
    """A short quote of the first place where two texts differ."""
    start = max(0, shared_prefix_length(asked, text) - 8)
    first, second = (repr(part[start : start + NUM_QUOTED_CHARS]) for part in (asked, text))
    return f"at character {shared_prefix_length(asked, text) + 1}, {first} became {second}"
