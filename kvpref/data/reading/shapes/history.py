"""Earlier rounds of a conversation, ``history: [[question, answer], ...]``: LLaMA-Factory and ms-swift."""

from __future__ import annotations

from typing import Any

from kvpref.data.reading.columns import PromptColumn
from kvpref.data.reading.messages import RowError
from kvpref.data.reading.shapes.found import Row

HISTORY = "history"

HISTORY_NOTICE = "`history` is written as the rounds before the prompt, in a conversation"


def with_history(prompt: PromptColumn, row: Row) -> PromptColumn:
    """The prompt preceded by the earlier rounds; unchanged if the row has no list of them.

    Like `system`, the list turns a row of texts into a conversation, even if it is empty.

    Raises:
        RowError: If a round is not a question and an answer, or the prompt is already a conversation.
    """
    rounds = row.get(HISTORY)
    if not isinstance(rounds, list) or prompt.value is None:
        return prompt
    if not isinstance(prompt.value, str):
        raise RowError(f"found `{HISTORY}` beside a `{prompt.name}` of messages; put its rounds into the messages")
    messages: list[dict[str, Any]] = []
    for index, one in enumerate(rounds):
        if not isinstance(one, list) or len(one) != 2 or not all(isinstance(text, str) for text in one):
            raise RowError(f"`{HISTORY}[{index}]` must be a list of two texts, question and answer")
        messages += [{"role": "user", "content": one[0]}, {"role": "assistant", "content": one[1]}]
    return PromptColumn([*messages, {"role": "user", "content": prompt.value}], prompt.name, (*prompt.read, HISTORY))
