"""Rows with one response; other rows may hold other responses to the same prompt."""

from __future__ import annotations

from kvpref.data.reading.columns import PromptColumn, find_prompt
from kvpref.data.reading.messages import RowError
from kvpref.data.reading.shapes.found import FoundResponses, Row
from kvpref.data.reading.shapes.pairs import conversation_column, split_last
from kvpref.data.reading.shapes.ratings import LABEL_COLUMNS, SCORE_COLUMNS, column_of, single_rating
from kvpref.data.reading.sharegpt import as_messages

COMPLETION_COLUMNS = ("completion", "response", "output")
"""Columns of the single response: TRL's and axolotl's name, ms-swift's, LLaMA-Factory's."""


def prompt_and_completion(row: Row) -> FoundResponses | None:
    """``{prompt, completion, label}``: TRL and axolotl; ``{instruction, input, output, kto_tag}``: LLaMA-Factory.

    With `score`, `reward` or `rating` instead of the label, a response with that score; with none, a demonstration.
    """
    name = column_of(row, COMPLETION_COLUMNS, "the response")
    if name is None or find_prompt(row).value is None:
        return None
    rated_by, score = single_rating(row)
    return FoundResponses(
        responses={name: row[name]},
        scores=(score,),
        read=(name, *(() if rated_by is None else (rated_by,))),
        is_single=True,
        rated_by=rated_by,
    )


def messages_and_label(row: Row) -> FoundResponses | None:
    """``{messages, label}``: ms-swift; ``{conversations, kto_tag}``: LLaMA-Factory.

    The label (or `score`, `reward`, `rating`) rates the last message.
    """
    name = conversation_column(row)
    if name is None or not any(column in row for column in (*LABEL_COLUMNS, *SCORE_COLUMNS)):
        return None
    for other in COMPLETION_COLUMNS:
        if other in row:
            raise RowError(
                f"found `{name}` and `{other}`, and either may hold the response; rename `{name}` to `prompt` if it "
                "ends with what the response answers, or keep one of the two"
            )
    prompt, response = split_last(as_messages(row[name]), name)
    rated_by, score = single_rating(row)
    assert rated_by is not None
    return FoundResponses(
        prompt=PromptColumn(prompt, "prompt", (name,)),
        responses={f"{name}[{len(prompt)}]": response},
        scores=(score,),
        read=(name, rated_by),
        is_single=True,
        rated_by=rated_by,
        notice=f"the last of `{name}` is taken as the response that `{rated_by}` rates",
    )


def text(row: Row) -> FoundResponses | None:
    """``{text}``: a text learned as a whole, as in TRL and LLaMA-Factory."""
    known = (*LABEL_COLUMNS, *SCORE_COLUMNS)
    if "text" not in row or find_prompt(row).value is not None or any(name in row for name in known):
        return None
    return FoundResponses(
        prompt=PromptColumn("", "prompt", ()),
        responses={"text": row["text"]},
        read=("text",),
        notice="`text` is taken as a response without a prompt: all of it is scored",
    )
