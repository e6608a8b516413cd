"""The prompt of a row, from its column or the common beginning of its responses, in the same form as the responses."""

from __future__ import annotations

from kvpref.data.reading.columns import PromptColumn
from kvpref.data.reading.messages import Message, RowError, parse_messages, parse_text, text_of, type_name

Messages = tuple[Message, ...]
Turns = str | Messages
"""A text, or a list of messages."""


def join_prompt(
    prompt: PromptColumn, system: str | None, responses: dict[str, Turns]
) -> tuple[Turns | None, tuple[Turns, ...]]:
    """Bring prompt and responses to one form: all text, or all messages.

    Args:
        prompt: The unchecked prompt.
        system: The text of a system message, or None. With one, even an empty one, texts are a conversation.
        responses: The responses, by their names in messages.

    Returns:
        The prompt, None if it is the common beginning of the texts, and the responses.

    Raises:
        RowError: If they do not fit together.
    """
    texts = tuple(response for response in responses.values() if isinstance(response, str))
    conversations = tuple(response for response in responses.values() if not isinstance(response, str))
    if isinstance(prompt.value, (dict, list)):
        return _join_messages(parse_messages(prompt.value, prompt.name), system, responses)
    if texts and conversations:
        raise RowError(f"{' and '.join(f'`{name}`' for name in responses)} mix strings and messages; use one form")
    if prompt.value is None:
        return _join_nothing(system, texts, conversations)
    if not isinstance(prompt.value, str):
        raise RowError(f"`{prompt.name}` must be a string or a list of messages, found {type_name(prompt.value)}")
    text = parse_text(prompt.value, prompt.name, may_be_empty=True)
    if conversations:
        shared, turns = _join_text_prompt(text, prompt.name, conversations)
        return with_system(shared, system), turns
    if system is None:
        return text, texts
    if not text:
        raise RowError(f"`{prompt.name}` is empty, and with `system` the row is a conversation, which needs a question")
    return _join_messages(({"role": "user", "content": text},), system, responses)


def _join_messages(
    prompt: Messages, system: str | None, responses: dict[str, Turns]
) -> tuple[Messages, tuple[Messages, ...]]:
    whole = with_system(prompt, system)
    turns = []
    for response in responses.values():
        if isinstance(response, str):
            response = ({"role": "assistant", "content": response},)
        # Some published datasets repeat the prompt inside each response.
        for repeated in (whole, prompt):
            if len(response) > len(repeated) and response[: len(repeated)] == repeated:
                response = response[len(repeated) :]
                break
        turns.append(response)
    return whole, tuple(turns)


def _join_nothing(
    system: str | None, texts: tuple[str, ...], conversations: tuple[Messages, ...]
) -> tuple[Messages | None, tuple[Turns, ...]]:
    if conversations:
        shared, turns = _split_conversations(conversations)
        return with_system(shared, system), turns
    if system is not None:
        raise RowError("with `system` the row is a conversation, and it has no prompt; add a `prompt` field")
    return None, texts


def with_system(prompt: Messages, system: str | None) -> Messages:
    """The messages, preceded by the system message if there is one.

    Raises:
        RowError: If they begin with a different one.
    """
    if not system:
        return prompt
    message = {"role": "system", "content": parse_text(system, "system")}
    if prompt[0]["role"] != "system":
        return (message, *prompt)
    if prompt[0]["content"] != system:
        raise RowError("`system` differs from the system message that the prompt begins with; keep one of the two")
    return prompt


def _join_text_prompt(
    prompt: str, name: str, conversations: tuple[Messages, ...]
) -> tuple[Messages, tuple[Messages, ...]]:
    if all(conversation[0]["role"] == "assistant" for conversation in conversations):
        return ({"role": "user", "content": prompt},), conversations
    shared, turns = _split_conversations(conversations)
    if text_of(shared[-1]) != prompt:
        raise RowError(
            f"`{name}` is a string that is not the last message that the responses' conversations share; "
            f"leave `{name}` out, or let the responses start with the assistant's message"
        )
    return shared, turns


def _split_conversations(conversations: tuple[Messages, ...]) -> tuple[Messages, tuple[Messages, ...]]:
    """Take the common leading messages as the prompt."""
    num_shared = 0
    for messages in zip(*conversations, strict=False):
        if any(message != messages[0] for message in messages):
            break
        num_shared += 1
    if num_shared == 0:
        raise RowError("the responses share no leading message, so there is no prompt; add a `prompt` field")
    if any(len(conversation) == num_shared for conversation in conversations):
        raise RowError("a response is empty: one conversation is the beginning of another; add a `prompt` field")
    return conversations[0][:num_shared], tuple(conversation[num_shared:] for conversation in conversations)
