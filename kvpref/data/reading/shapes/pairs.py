"""Rows with a better and a worse response."""

from __future__ import annotations

from typing import Any

from kvpref.data.reading.columns import CONVERSATION_COLUMNS, PromptColumn, find_prompt
from kvpref.data.reading.messages import RowError, parse_messages, type_name
from kvpref.data.reading.shapes.found import FoundResponses, Ratings, Row
from kvpref.data.reading.shapes.ratings import column_of, pair_ratings
from kvpref.data.reading.sharegpt import as_messages


def chosen_and_rejected(row: Row) -> FoundResponses | None:
    """``{prompt, chosen, rejected}``, or without prompt if both begin with it; with or without ``{score_chosen,
    score_rejected}`` (UltraFeedback, binarized)."""
    if not {"chosen", "rejected"} <= set(row):
        return None
    return _pair(row, "chosen", "rejected")


def messages_chosen_and_rejected(row: Row) -> FoundResponses | None:
    """``{messages, chosen, rejected}``: axolotl's `chat_template.default`; with `conversations`, LLaMA-Factory's
    ranking rows in the format of ShareGPT."""
    name = conversation_column(row)
    if not {"chosen", "rejected"} <= set(row) or name is None or find_prompt(row).value is not None:
        return None
    # If both begin with the prompt, the messages usually repeat one of the conversations.
    if _begin_alike(row["chosen"], row["rejected"]):
        return None
    prompt = as_messages(row[name])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise RowError(f"`{name}` must be a list of messages, found {type_name(prompt)}")
    if parse_messages(prompt, name)[-1]["role"] == "assistant":
        raise RowError(
            f"`{name}` ends with an assistant turn: with `chosen` behind it, it may be the prompt, or the whole "
            f"conversation; end `{name}` with what `chosen` answers, or rename it if it is not to be read"
        )
    return _pair(row, "chosen", "rejected", PromptColumn(prompt, "prompt", (name,)))


def messages_and_rejected(row: Row) -> FoundResponses | None:
    """``{messages, rejected_response}`` or ``{messages, rejected_messages}``: ms-swift.

    The messages end with the better response; the other column is the worse one, alone or as a conversation.
    """
    name = conversation_column(row)
    worse = column_of(row, ("rejected_response", "rejected_messages"), "the worse response")
    if name is None or worse is None or any(other in row for other in ("chosen", "chosen_response", "response")):
        return None
    messages = as_messages(row[name])
    if worse == "rejected_messages":
        other = as_messages(row[worse])
        for column, value in ((name, messages), (worse, other)):
            if not isinstance(value, list):
                raise RowError(f"`{column}` must be a list of messages, found {type_name(value)}")
        return FoundResponses(
            prompt=PromptColumn(None),
            responses={name: messages, worse: other},
            labels=(True, False),
            read=(name, worse),
        )
    prompt, response = split_last(messages, name)
    return FoundResponses(
        prompt=PromptColumn(prompt, "prompt", (name,)),
        responses={f"{name}[{len(prompt)}]": response, worse: row[worse]},
        labels=(True, False),
        read=(name, worse),
    )


def response_and_rejected(row: Row) -> FoundResponses | None:
    """``{instruction, chosen_response, rejected_response}``: axolotl's `chatml.argilla`; ``{query, response,
    rejected_response}``: ms-swift."""
    better = column_of(row, ("chosen_response", "response"), "the better response")
    if better is None or "rejected_response" not in row or conversation_column(row) is not None:
        return None
    return _pair(row, better, "rejected_response")


def two_outputs(row: Row) -> FoundResponses | None:
    """``{instruction, input, output: [better, worse]}``: ranking rows of earlier versions of LLaMA-Factory."""
    output = row.get("output")
    if not isinstance(output, list) or not {"instruction", "input"} & set(row):
        return None
    if len(output) != 2 or not all(isinstance(text, str) for text in output):
        raise RowError(
            f"`output` is a list of {len(output)} items; expected two texts, the better response first, or one text; "
            "write more of them as `responses` with `scores`"
        )
    return FoundResponses(
        responses={f"output[{index}]": text for index, text in enumerate(output)},
        labels=(True, False),
        read=("output",),
        notice="of the two texts of `output` the first is taken as the better response",
    )


def conversation_column(row: Row) -> str | None:
    """The column that holds messages, if there is one.

    Raises:
        RowError: If there are several.
    """
    return column_of(row, CONVERSATION_COLUMNS, "the conversation")


def split_last(messages: Any, name: str) -> tuple[list[Any], list[Any]]:
    """The messages before the last, and the last one, which must be the assistant's.

    Raises:
        RowError: If there is nothing before it, or it has another role.
    """
    if not isinstance(messages, list):
        raise RowError(f"`{name}` must be a list of messages, found {type_name(messages)}")
    parsed = parse_messages(messages, name)
    if parsed[-1]["role"] != "assistant":
        raise RowError(
            f"the last of `{name}` is of role {parsed[-1]['role']!r}; expected the assistant's response, which is what "
            "is trained on (kvpref generates none)"
        )
    if len(parsed) == 1:
        raise RowError(f"`{name}` holds nothing but a response; put the messages that it answers before it")
    return list(parsed[:-1]), list(parsed[-1:])


def _pair(row: Row, better: str, worse: str, prompt: PromptColumn | None = None) -> FoundResponses:
    names, scores = pair_ratings(row)
    return FoundResponses(
        prompt=prompt,
        responses={better: row[better], worse: row[worse]},
        scores=scores,
        labels=(True, False),
        read=(better, worse, *names, *(() if prompt is None else prompt.read)),
        notice=_notice(names, scores, f"`{better}` and `{worse}`"),
    )


def _notice(names: tuple[str, ...], scores: Ratings | None, responses: str) -> str | None:
    if scores is None:
        return None
    notice = f"`{names[0]}` and `{names[1]}` are the scores of {responses}"
    return f"{notice}, and equal: losses that compare scores see no preference" if len(set(scores)) == 1 else notice


def _begin_alike(chosen: Any, rejected: Any) -> bool:
    return isinstance(chosen, list) and isinstance(rejected, list) and chosen[:1] == rejected[:1] != []
