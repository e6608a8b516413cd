"""Builds a task's groups from its tokens, cut to the length limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as AbstractSequence
from itertools import accumulate, groupby, islice, pairwise
from typing import Any, NamedTuple

from kvpref.data.reading.messages import RowError
from kvpref.data.reading.tokenization import TokenizedSequence
from kvpref.data.reading.trajectories.attempts import TURN_SCORES, Attempt
from kvpref.data.reading.trajectories.tasks import Answer, RenderedTask, score_of
from kvpref.data.reading.truncation import prompt_cuts, truncate_row
from kvpref.prefix.radix import shared_prefix_length
from kvpref.records.groups import Group, Sequence

Counts = Counter[str]
"""Counts of what happened, by the names of a report's fields."""


class Limits(NamedTuple):
    """How long prompts and responses may be.

    Attributes:
        max_prompt_tokens: Tokens before the first assistant turn; None for any number.
        max_response_tokens: Tokens from the first assistant turn on; None for any number.
        bos_token_id: A token that stays at the beginning, or None.
    """

    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    bos_token_id: int | None = None


class _Part(NamedTuple):
    """One token row of an attempt.

    Attributes:
        ids: Its tokens.
        flags: Which are scored.
        stops: For each turn scored in it, the position after its last token.
    """

    ids: list[int]
    flags: list[bool]
    stops: list[int]


def build_groups(
    rendered: RenderedTask, sequences: AbstractSequence[TokenizedSequence], location: str, limits: Limits
) -> tuple[list[Group], Counts]:
    """The groups of a task.

    Args:
        rendered: The task's texts.
        sequences: The tokens of the texts.
        location: The task's location in the data.
        limits: If a response is too long, whole turns at its end are left out; if none would remain, the first turn is
            cut. Prompts lose their beginning, the same tokens in all sequences of a group.

    Returns:
        The groups (one, or one per branch) and the counts.

    Raises:
        RowError: If turns cannot be told apart in tokens, or a column's entries do not fit.
    """
    if rendered.branches is not None:
        return _build_branches(rendered, sequences, location, limits)
    remaining = iter(sequences)
    attempts = [
        [_part(next(remaining), counts, attempt) for counts in parts]
        for parts, attempt in zip(rendered.turns, rendered.task.attempts, strict=True)
    ]
    counts: Counts = Counter()
    cuts = prompt_cuts([_num_prompt(parts[0]) for parts in attempts], limits.max_prompt_tokens)
    counts["num_truncated_prompts"] = int(max(cuts) > 0)
    counts["prompt_tokens_cut"] = max(cuts)
    responses, columns = [], []
    for attempt, parts, cut in zip(rendered.task.attempts, attempts, cuts, strict=True):
        num_prompt = _num_prompt(parts[0])
        kept = _keep_turns(parts, num_prompt, limits.max_response_tokens)
        lost = sum(len(part.ids) for part in parts) - sum(len(part.ids) for part in kept)
        counts["num_truncated_responses"] += lost > 0
        counts["response_tokens_cut"] += lost
        _count(counts, kept)
        columns.append(_columns_of(attempt, parts, kept))
        kept = [_cut_prompt(part, kept[0], num_prompt, cut, limits.bos_token_id) for part in kept]
        *earlier, last = [Sequence(part.ids, part.flags) for part in kept]
        responses.append(Sequence(last.ids, last.flags, earlier=earlier))
    names = dict.fromkeys(name for own in columns for name in own)
    return [
        Group(
            responses,
            scores=_scores([attempt.score for attempt in rendered.task.attempts]),
            id=rendered.task.group_id(location),
            columns={**rendered.task.columns, **{name: [own[name] for own in columns] for name in names}},
        )
    ], counts


def _part(sequence: TokenizedSequence, counts: tuple[int, ...], attempt: Attempt) -> _Part:
    """A text's tokens with the ends of its turns; `counts` gives each turn's number of scored runs."""
    flags = sequence.scored
    runs = (list(run) for is_scored, run in groupby(range(len(flags)), key=flags.__getitem__) if is_scored)
    ends = [run[-1] + 1 for run in runs]
    if len(ends) != sum(counts):
        raise RowError(
            f"{attempt.name}: {sum(counts)} runs of text are scored, and {len(ends)} runs of tokens; a turn that has "
            "no token of its own, or follows another one without a token between them, cannot be told apart; use a "
            "chat template that ends turns with a token of their own"
        )
    return _Part(sequence.input_ids, flags, [ends[last - 1] for last in accumulate(counts)])


def _num_prompt(part: _Part) -> int:
    return part.flags.index(True)


def _keep_turns(parts: list[_Part], num_prompt: int, limit: int | None) -> list[_Part]:
    """The parts without trailing turns that end too far from the beginning of the first."""
    if limit is None:
        return parts
    kept: list[_Part] = []
    for part in parts:
        stops = [stop for stop in part.stops if stop - num_prompt <= limit]
        if len(stops) == len(part.stops):
            kept.append(part)
            continue
        if stops:
            kept.append(_Part(part.ids[: stops[-1]], part.flags[: stops[-1]], stops))
        break
    if not kept:
        stop = num_prompt + limit
        return [_Part(parts[0].ids[:stop], parts[0].flags[:stop], [stop])]
    return kept


def _cut_prompt(part: _Part, first: _Part, num_prompt: int, cut: int, bos_token_id: int | None) -> _Part:
    """A part with prompt tokens removed, after BOS if it begins with one."""
    if not cut:
        return part
    front = int(bos_token_id is not None and part.ids[0] == bos_token_id)
    if shared_prefix_length(part.ids, first.ids[:num_prompt]) < front + cut:
        raise RowError(
            "the prompt is longer than max_prompt_tokens, and the chat template writes it differently for later turns, "
            "so that it cannot be cut alike; raise max_prompt_tokens"
        )
    kept = slice(front + cut, None)
    return _Part(
        part.ids[:front] + part.ids[kept], part.flags[:front] + part.flags[kept], [stop - cut for stop in part.stops]
    )


def _count(counts: Counts, parts: list[_Part]) -> None:
    counts["num_trajectories"] += 1
    counts["num_turns"] += sum(len(part.stops) for part in parts)
    counts["num_rewritten"] += len(parts) > 1
    counts["num_earlier_parts"] += len(parts) - 1
    counts["rewritten_tokens"] += sum(
        len(part.ids) - shared_prefix_length(part.ids, later.ids) for part, later in pairwise(parts)
    )


def _columns_of(attempt: Attempt, whole: list[_Part], kept: list[_Part]) -> dict[str, Any]:
    """An attempt's columns; those by turn or token lose the entries of turns that were left out.

    Raises:
        RowError: If a turn was cut for which a column has entries by token.
    """
    columns = dict(attempt.columns)
    if attempt.turn_scores is not None:
        columns[TURN_SCORES] = list(attempt.turn_scores)
    num_turns, num_kept = (sum(len(part.stops) for part in parts) for parts in (whole, kept))
    num_tokens, num_left = (sum(sum(part.flags) for part in parts) for parts in (whole, kept))
    for name, value in columns.items():
        if not isinstance(value, list):
            continue
        if len(value) == num_turns:
            columns[name] = value[:num_kept]
        elif len(value) == num_tokens:
            if whole[0].stops[0] > kept[0].stops[0]:
                raise RowError(
                    f"column `{name}` has an entry for each of the {num_tokens} scored tokens of {attempt.name}, whose "
                    f"first turn is cut to {num_left}; raise max_response_tokens"
                )
            columns[name] = value[:num_left]
    return columns


def _scores(scores: list[float | None]) -> list[float | None] | None:
    return None if all(score is None for score in scores) else scores


def _build_branches(
    rendered: RenderedTask, sequences: AbstractSequence[TokenizedSequence], location: str, limits: Limits
) -> tuple[list[Group], Counts]:
    assert rendered.branches is not None
    counts: Counts = Counter(num_branches=len(rendered.branches), num_single=rendered.num_single)
    counts["num_trajectories"] = len(rendered.task.attempts)
    groups = []
    remaining = iter(sequences)
    for answers in rendered.branches:
        truncated = truncate_row(
            list(islice(remaining, len(answers))),
            max_prompt_tokens=limits.max_prompt_tokens,
            max_response_tokens=limits.max_response_tokens,
            bos_token_id=limits.bos_token_id,
        )
        counts["num_truncated_prompts"] += truncated.prompt_tokens_cut > 0
        counts["prompt_tokens_cut"] += truncated.prompt_tokens_cut
        counts["num_truncated_responses"] += truncated.num_truncated_responses
        counts["response_tokens_cut"] += truncated.response_tokens_cut
        counts["num_turns"] += len(answers)
        attempts = rendered.task.attempts
        first = answers[0].members[0]
        place = f"{attempts[first.attempt].name}, turn {first.turn + 1}"
        names = attempts[0].columns
        groups.append(
            Group(
                [Sequence(item.input_ids, item.scored) for item in truncated.sequences],
                scores=_scores([score_of(attempts, answer) for answer in answers]),
                id=f"{rendered.task.group_id(location)}, {place.replace('`', '')}",
                columns={
                    **rendered.task.columns,
                    **{name: [_at_turn(attempts, answer, name) for answer in answers] for name in names},
                },
            )
        )
    return groups, counts


def _at_turn(attempts: tuple[Attempt, ...], answer: Answer, name: str) -> Any:
    """A column's value for an answer, from the first attempt that contains it.

    Raises:
        RowError: If it has entries that are not by turn.
    """
    first = answer.members[0]
    attempt = attempts[first.attempt]
    value = attempt.columns[name]
    if not isinstance(value, list):
        return value
    if len(value) != len(attempt.turns):
        raise RowError(
            f"column `{name}` has {len(value)} entries for the {len(attempt.turns)} turns of {attempt.name}; where "
            "turns make groups, a column has one entry per trajectory or per turn"
        )
    return value[first.turn]
