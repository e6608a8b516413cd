"""Mismatched responses: a group's prompt, answered with the response of another group.

Their log-probs estimate how far the policy has moved from the reference in general. They share the group's prompt and
so cost only their own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvpref.errors import InputError
from kvpref.losses.interface import Groups
from kvpref.records.groups import Group, Sequence

MISMATCHED = "mismatched"
"""The column of flags, one per sequence of the group."""


def mismatched_flags(group: Group) -> list[bool]:
    """Which sequences of a group are mismatched responses."""
    flags = group.columns.get(MISMATCHED)
    return [bool(flag) for flag in flags] if isinstance(flags, list | tuple) else [False] * len(group)


def add_mismatched(groups: Groups, count: int) -> Iterator[Group]:
    """Each group with `count` mismatched responses after its own; groups that already have some are unchanged.

    They come from the nearest groups before it with another prompt, wrapping around to the end for the first ones, and
    stand for the data's responses: of a group of N, the n-th response in turn.

    Args:
        groups: At least two with different prompts.
        count: At least 1.

    Raises:
        InputError: If a group has fewer than `count` others with another prompt.
    """
    for index in range(len(groups)):
        group = groups[index]
        yield group if MISMATCHED in group.columns else _with_mismatched(group, _others(groups, index, count), index)


def _others(groups: Groups, index: int, count: int) -> list[Group]:
    prompt = _prompt_of(groups[index])
    others: list[Group] = []
    for step in range(1, len(groups)):
        other = groups[(index - step) % len(groups)]
        if _prompt_of(other) != prompt:
            others.append(other)
        if len(others) == count:
            return others
    raise InputError(
        f"{groups[index].id}: no mismatched response can be made; expected {count} groups with another prompt, found "
        f"{len(others)} among {len(groups)}"
    )


def _with_mismatched(group: Group, others: list[Group], index: int) -> Group:
    added: list[Sequence] = []
    for other in others:
        own = [s for s, flag in zip(other.sequences, mismatched_flags(other), strict=True) if not flag]
        added.append(_behind_prompt_of(group, own[index % len(own)]))
    fill = [None] * len(added)
    columns = {
        name: [*value, *fill] if group.is_per_sequence(value) else value for name, value in group.columns.items()
    }
    return Group(
        [*group.sequences, *added],
        scores=None if group.scores is None or group.ranks is not None else [*group.scores, *fill],
        ranks=None if group.ranks is None else [*group.ranks, *fill],
        labels=None if group.labels is None else [*group.labels, *[False] * len(added)],
        id=group.id,
        columns={**columns, MISMATCHED: [False] * len(group) + [True] * len(added)},
    )


def _behind_prompt_of(group: Group, response: Sequence) -> Sequence:
    """A response of another group after this group's prompt, with its weights, in all of its parts."""
    first, other = group.sequences[0].parts[0], response.parts[0]
    prompt, start = first.ids[: _response_start(first)], _response_start(other)
    parts: list[Sequence] = []
    for part in response.parts:
        if not np.array_equal(part.ids[:start], other.ids[:start]):
            raise InputError(
                f"{group.id}: no mismatched response can be made of one whose prompt the chat template rewrites for "
                "later turns; use apo_zero_unpaired, which needs none"
            )
        ids = np.concatenate([prompt, part.ids[start:]])
        flags = np.concatenate([np.zeros(len(prompt), np.bool_), part.flags[start:]])
        parts.append(Sequence(ids, flags, first.images, part.weights))
    *earlier, last = parts
    return Sequence(last.ids, last.flags, last.images, last.weights, earlier)


def _prompt_of(group: Group) -> tuple[int, ...]:
    """The tokens before the first scored one; those of different images differ."""
    first = group.sequences[0].parts[0]
    return tuple(first.tree_ids[: _response_start(first)].tolist())


def _response_start(sequence: Sequence) -> int:
    return int(sequence.flags.argmax()) if sequence.flags.any() else len(sequence)
