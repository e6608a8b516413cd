"""Rows of several responses to a prompt."""

from __future__ import annotations

from typing import Any

from kvpref.data.reading.messages import RowError, type_name
from kvpref.data.reading.numbers import parse_number
from kvpref.data.reading.shapes.found import FoundResponses, Row
from kvpref.data.reading.shapes.ratings import SCORE_COLUMNS, column_of, list_ratings

RESPONSE_LISTS = ("responses", "completions", "generations")
"""Columns of several responses: kvpref's, TRL's and UltraFeedback's, distilabel's."""

OBJECT_LISTS = (*RESPONSE_LISTS, "answers")
"""Columns of objects that each hold a response and its rating; the last is Nectar's."""

_TEXT_KEYS = ("response", "completion", "answer")
_OVERALL, _FINE_GRAINED = "overall_score", "fine-grained_score"


def responses_and_scores(row: Row) -> FoundResponses | None:
    """``{prompt, responses, scores}``, also with `ranks`, `rewards` or `ratings`, of `completions` or `generations`."""
    name = _list_column(row, RESPONSE_LISTS)
    if name is None:
        return None
    responses = row[name]
    if not isinstance(responses, list):
        raise RowError(f"`{name}` must be a list, found {type_name(responses)}")
    if not responses:
        raise RowError(f"`{name}` is empty; expected at least one response")
    if all(_is_rated_object(item) for item in responses):
        return None
    rated_by, scores, ranks = list_ratings(row, len(responses))
    return FoundResponses(
        responses={f"{name}[{index}]": response for index, response in enumerate(responses)},
        scores=scores,
        ranks=ranks,
        read=(name, *(() if rated_by is None else (rated_by,))),
        notice=f"`{rated_by}` are taken as the scores" if rated_by in ("rewards", "ratings") else None,
    )


def rated_objects(row: Row) -> FoundResponses | None:
    """``{instruction, completions: [{response, overall_score}]}``: UltraFeedback; ``{prompt, answers: [{answer,
    rank}]}``: axolotl's `zephyr.nectar`."""
    name = _list_column(row, OBJECT_LISTS)
    if name is None or not isinstance(row[name], list) or not all(map(_is_rated_object, row[name])):
        return None
    items: list[dict[str, Any]] = row[name]
    keys = [column_of(item, _TEXT_KEYS, "the response") or "" for item in items]
    rated_by = {_rating_key(item, f"{name}[{index}]") for index, item in enumerate(items)} - {None}
    if len(rated_by) > 1:
        raise RowError(
            f"`{name}` are rated by {' and '.join(map(repr, sorted(map(str, rated_by))))}; give all the same"
        )
    (rating,) = rated_by or {None}
    numbers = None
    if rating is not None:
        numbers = tuple(
            parse_number(item[rating], f"{name}[{index}].{rating}") if rating in item else None
            for index, item in enumerate(items)
        )
    left = dict.fromkeys(key for item, own in zip(items, keys, strict=True) for key in item if key not in (own, rating))
    notice = f"`{rating}` is taken as the score of each of `{name}`" if rating not in (None, "rank", "score") else None
    return FoundResponses(
        responses={
            f"{name}[{index}].{key}": item[key] for index, (item, key) in enumerate(zip(items, keys, strict=True))
        },
        scores=None if rating == "rank" else numbers,
        ranks=numbers if rating == "rank" else None,
        read=(name,),
        unread=tuple(f"{name}.{key}" for key in left),
        notice=notice,
    )


def _list_column(row: Row, names: tuple[str, ...]) -> str | None:
    # kvpref's own name comes first, and many datasets have gold answers beside responses.
    found = [name for name in names if name in row]
    if "responses" in found or found[-1:] == ["answers"]:
        return found[0]
    return column_of(row, names, "the responses")


def _is_rated_object(item: Any) -> bool:
    """Whether a response is an object with its text under a name, but not a message."""
    return isinstance(item, dict) and not {"role", "from"} & set(item) and any(key in item for key in _TEXT_KEYS)


def _rating_key(item: Row, name: str) -> str | None:
    found = [key for key in (*SCORE_COLUMNS, "rank", _OVERALL, _FINE_GRAINED) if key in item]
    # Both rate the whole answer; the binarized version of the dataset is made from the first.
    if found == [_OVERALL, _FINE_GRAINED]:
        return _OVERALL
    if len(found) > 1:
        raise RowError(f"`{name}` has `{found[0]}` and `{found[1]}`, and either may rate it; keep one of the two")
    return found[0] if found else None
