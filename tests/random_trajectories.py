"""Random trees of trajectories: one trunk with many places, both ways at each, chains of calls, the same twice."""

from __future__ import annotations

import random
from collections.abc import Callable

from tiny_models import VOCAB_SIZE

from kvpref import Group, Sequence

Draw = Callable[[int], list[int]]


def _comb(generator: random.Random, draw: Draw) -> list[list[int]]:
    """One trunk that is left at up to 30 places."""
    trunk = draw(40)
    places = generator.sample(range(1, 41), generator.choice((3, 9, 30)))
    return [*(trunk[:place] + draw(generator.randint(0, 3)) for place in places), trunk]


def _binary(generator: random.Random, draw: Draw) -> list[list[int]]:
    ways = [draw(generator.randint(1, 3))]
    for _ in range(3):
        ways = [way + draw(generator.randint(1, 3)) for way in ways for _ in range(2)]
    return ways


def _chain(generator: random.Random, draw: Draw) -> list[list[int]]:
    """Each the beginning of a longer one."""
    longest = draw(25)
    return [longest[:stop] for stop in generator.sample(range(1, 26), generator.randint(2, 9))]


def _tree(generator: random.Random, draw: Draw) -> list[list[int]]:
    """Each leaves an earlier one anywhere, or ends there, or is it."""
    made = [draw(generator.randint(2, 6))]
    for _ in range(generator.randint(2, 13)):
        before = generator.choice(made)
        made.append(before[: generator.randint(1, len(before))] + draw(generator.randint(0, 6)))
    return made


KINDS = {build.__name__.strip("_"): build for build in (_comb, _binary, _chain, _tree)}


def trajectories(kind: str, seed: int) -> list[Sequence]:
    """Sequences, most of which share tokens that some of them score and others do not."""
    generator = random.Random(f"{kind} {seed}")

    def draw(count: int) -> list[int]:
        return [generator.randrange(3, VOCAB_SIZE) for _ in range(count)]

    def scored(ids: list[int]) -> list[bool]:
        start, chance = generator.randint(1, len(ids)), generator.choice((0.4, 1.0, 1.0, 0.0))
        return [place >= start and generator.random() < chance for place in range(len(ids))]

    lists = KINDS[kind](generator, draw)
    generator.shuffle(lists)
    made = [Sequence(ids, scored(ids)) for ids in lists]
    first = lists[0]
    return [*made, Sequence([*first, 5], [False] * len(first) + [True])]  # so that something is scored


def groups_of(sequences: list[Sequence], seed: int) -> list[Group]:
    """Groups of them, some in several parts and some with weights."""
    generator = random.Random(seed)
    responses = []
    left = [
        Sequence(each.ids, each.flags, weights=[generator.choice((0.0, 0.5, 2.0)) for _ in range(each.num_scored)])
        if generator.random() < 0.3
        else each
        for each in sequences
    ]
    while left:
        own = [left.pop() for _ in range(min(len(left), generator.choice((1, 1, 2))))]
        responses.append(Sequence(own[-1].ids, own[-1].flags, weights=own[-1].weights, earlier=own[:-1]))
    half = len(responses) // 2 or 1
    return [Group(several) for several in (responses[:half], responses[half:]) if several]
