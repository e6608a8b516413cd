"""Columns that rate responses: scores, rewards, ratings, ranks, and labels for good or bad."""

from __future__ import annotations

import json
from collections.abc import Iterable

from kvpref.data.reading.messages import RowError, type_name
from kvpref.data.reading.numbers import parse_number
from kvpref.data.reading.shapes.found import Ratings, Row

LABEL_COLUMNS = ("label", "kto_tag")
"""Whether a single response is good: `label` in TRL, axolotl and ms-swift, `kto_tag` in LLaMA-Factory."""

SCORE_COLUMNS = ("score", "reward", "rating")
"""Columns with the score of a single response."""

LIST_COLUMNS = ("scores", "rewards", "ratings")
"""Columns with a score for each of a row's responses."""

PAIR_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_reward", "rejected_reward"),
)
"""Columns with the scores of the two responses of a pair, as datasets name them."""

RATINGS: tuple[tuple[str, ...], ...] = (
    (*LABEL_COLUMNS, *SCORE_COLUMNS),
    (*LIST_COLUMNS, "ranks"),
    *zip(*PAIR_COLUMNS, strict=True),
)
"""Columns of which a row is rated by one: where several say different things, the user has to choose."""


MAX_QUOTED_CHARS = 40


def column_of(row: Row, names: Iterable[str], meaning: str) -> str | None:
    """The one of several columns that the row has, or None.

    Args:
        row: The row.
        names: Columns with the same meaning.
        meaning: The meaning, for the error.

    Raises:
        RowError: If the row has several.
    """
    found = [name for name in names if name in row]
    if len(found) > 1:
        raise RowError(f"found `{found[0]}` and `{found[1]}`, and either may be {meaning}; keep one of the two")
    return found[0] if found else None


def check_agreement(row: Row, name: str, others: Iterable[str]) -> None:
    """Refuse ratings beside kvpref's own that say something else.

    Args:
        row: The row.
        name: The column that is read.
        others: Columns with the same meaning, which the row may have.

    Raises:
        RowError: Naming the first that differs.
    """
    for other in others:
        if other != name and other in row and row[other] != row[name]:
            raise RowError(
                f"`{name}` is {_quote(row[name])} and `{other}` {_quote(row[other])}, and either may be the rating; "
                f"choose one, as with --column {name}={other} (or {name}={name})"
            )


def single_rating(row: Row) -> tuple[str | None, float | None]:
    """The column that rates a row's single response, and the score in it; labels are scores of 1 and 0.

    Raises:
        RowError: If several columns do and differ, or the value is not a rating.
    """
    others: tuple[str, ...] = SCORE_COLUMNS
    if "score" in row:
        check_agreement(row, "score", SCORE_COLUMNS)
        others = ("score",)
    name = column_of(row, (*LABEL_COLUMNS, *others), "what says how good the response is")
    if name is None:
        return None, None
    return name, parse_label(row[name], name) if name in LABEL_COLUMNS else parse_number(row[name], name)


def parse_label(value: object, name: str) -> float:
    """1 for good, 0 for bad.

    Raises:
        RowError: If the value means neither.
    """
    text = value.strip().lower() if isinstance(value, str) else value
    if text in ("true", "false"):
        return float(text == "true")
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    raise RowError(
        f"`{name}` is {value!r}; expected true or false (or 1 and 0) for a good or bad response; a number that says "
        "how good it is goes into `score`"
    )


def list_ratings(row: Row, num_responses: int) -> tuple[str | None, Ratings | None, Ratings | None]:
    """The column that rates a row's responses, and its scores or its ranks.

    Raises:
        RowError: If several columns do, or there is not one number or null per response.
    """
    if "scores" in row and "ranks" in row:
        raise RowError("found both `scores` and `ranks`; keep one of the two")
    if "scores" in row:
        check_agreement(row, "scores", LIST_COLUMNS)
    own = [name for name in ("scores", "ranks") if name in row]
    name = own[0] if own else column_of(row, LIST_COLUMNS, "the scores")
    if name is None:
        return None, None, None
    numbers = parse_numbers(row[name], name, num_responses)
    return (name, None, numbers) if name == "ranks" else (name, numbers, None)


def parse_numbers(values: object, name: str, num_responses: int) -> Ratings:
    """One finite number or None per response.

    Raises:
        RowError: If it is anything else.
    """
    if not isinstance(values, list):
        raise RowError(f"`{name}` must be a list of numbers or nulls, found {type_name(values)}")
    if len(values) != num_responses:
        raise RowError(f"`{name}` has {len(values)} entries for {num_responses} responses; expected one per response")
    return tuple(
        None if value is None else parse_number(value, f"{name}[{index}]") for index, value in enumerate(values)
    )


def pair_ratings(row: Row) -> tuple[tuple[str, ...], Ratings | None]:
    """The columns that rate a pair, and the scores in them, the chosen response's first.

    Raises:
        RowError: If several pairs of columns do, or the rejected response scores more.
    """
    found = [names for names in PAIR_COLUMNS if any(name in row for name in names)]
    if not found:
        return (), None
    names = found[0]
    # kvpref's own names come first, if both are there.
    if len(found) > 1 and (names != PAIR_COLUMNS[0] or any(name not in row for name in names)):
        raise RowError(
            f"found `{names[0]}` and `{found[1][0]}`, and either may be the score of the pair; rename one to "
            "`score_chosen` (and `score_rejected`)"
        )
    for own, alike in zip(names, zip(*PAIR_COLUMNS, strict=True), strict=True):
        if own in row:
            check_agreement(row, own, alike)
    good, bad = scores = tuple(parse_number(row[name], name) if name in row else None for name in names)
    if good is not None and bad is not None and good < bad:
        raise RowError(
            f"`{names[0]}` is {good:g} and `{names[1]}` {bad:g}, so that `chosen` is the worse response by its score; "
            "swap the responses or the scores, or leave the scores out"
        )
    return names, scores


def _quote(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[:MAX_QUOTED_CHARS]}..."
