"""Micro-batches for the exactness tests: every shape of sharing that preference data can have."""

from __future__ import annotations

import random
from collections.abc import Callable

from tiny_models import VOCAB_SIZE

from kvpref import Group, Sequence


def tokens(count: int, seed: int) -> list[int]:
    """Random token ids without the special ones."""
    generator = random.Random(seed)
    return [generator.randrange(3, VOCAB_SIZE) for _ in range(count)]


def _group(prompt: list[int], *responses: list[int]) -> Group:
    return Group([Sequence.from_prompt_and_response(prompt, response) for response in responses])


def pairs() -> list[Group]:
    """Two DPO pairs and a group of four, lengths all different."""
    return [
        _group(tokens(7, 1), tokens(5, 2), tokens(3, 3)),
        _group(tokens(11, 4), tokens(2, 5), tokens(6, 6), tokens(4, 7), tokens(1, 8)),
        _group(tokens(3, 9), tokens(4, 10), tokens(4, 11)),
    ]


def story_questions_answers() -> list[Group]:
    """Three levels: a story, its questions, their answers."""
    story = tokens(9, 20)
    return [
        _group(story + tokens(4, 21), tokens(3, 22), tokens(5, 23), tokens(2, 24)),
        _group(story + tokens(3, 25), tokens(4, 26), tokens(1, 27)),
        _group(tokens(6, 28), tokens(3, 29), tokens(3, 30)),
    ]


def five_levels() -> list[Group]:
    """Five levels: a system prompt over stories over questions, and answers that begin alike."""
    system, story, question, opening = tokens(5, 40), tokens(6, 41), tokens(4, 42), tokens(3, 43)
    return [
        _group(system + story + question, opening + tokens(3, 44), opening + tokens(2, 45), tokens(4, 46)),
        _group(system + story + tokens(3, 47), tokens(3, 48), tokens(2, 49)),
        _group(system + tokens(4, 50), tokens(2, 51), tokens(5, 52)),
    ]


def shared_system_prompt() -> list[Group]:
    """Groups that have nothing in common but the system prompt."""
    system = tokens(8, 60)
    return [_group(system + tokens(3 + i, 61 + i), tokens(2 + i, 70 + i), tokens(4, 80 + i)) for i in range(3)]


def single_responses() -> list[Group]:
    """Groups of one response: nothing to share."""
    return [_group(tokens(4, 90), tokens(3, 91)), _group(tokens(2, 92), tokens(5, 93))]


def identical_responses() -> list[Group]:
    """The same response twice in a group, and a whole group twice."""
    response = tokens(4, 101)
    group = _group(tokens(6, 100), response, response, tokens(3, 102))
    return [group, _group(tokens(5, 103), tokens(2, 104)), group]


def nested_responses() -> list[Group]:
    """One response a prefix of another, which is a prefix of a third."""
    response = tokens(6, 111)
    return [_group(tokens(5, 110), response[:4], response, response[:2], tokens(3, 112))]


def attempts() -> list[Group]:
    """Attempts of several turns that part after the first, the second and the third; a second task begins alike."""
    system, turns = tokens(6, 130), [(tokens(3, 131 + i), tokens(2 + i % 3, 141 + i)) for i in range(4)]

    def attempt(num_shared: int, seed: int) -> Sequence:
        ids, flags = [*system], [False] * len(system)
        for index, (asked, answered) in enumerate(turns):
            answer = answered if index < num_shared else tokens(3, seed + index)
            ids += [*asked, *answer]
            flags += [False] * len(asked) + [True] * len(answer)
        return Sequence(ids, flags)

    return [
        Group([attempt(1, 150), attempt(2, 160), attempt(3, 170), attempt(4, 180), attempt(3, 190)]),
        Group([Sequence.from_prompt_and_response(system + tokens(2, 200), tokens(4, seed)) for seed in (201, 202)]),
    ]


def calls() -> list[Group]:
    """One row per model call, each the beginning of the next; and the turns once more with thinking that is dropped."""
    ids, rows = tokens(5, 210), []
    for index in range(5):
        ids = ids + tokens(2, 220 + index)
        rows.append(Sequence.from_prompt_and_response(ids, tokens(1 + index % 2, 230 + index) + tokens(2, 240 + index)))
        answer = tokens(2, 250 + index)
        rows.append(Sequence.from_prompt_and_response(ids, answer))
        ids = ids + answer
    return [Group(rows)]


def nothing_shared() -> list[Group]:
    """First tokens all different, within groups too."""
    rows = [[3 + i, *tokens(6 + i, 120 + i)] for i in range(4)]
    sequences = [Sequence(row, [False, False] + [True] * (len(row) - 2)) for row in rows]
    return [Group(sequences[:2]), Group(sequences[2:])]


def one_token_prompts() -> list[Group]:
    """Prompts that are a BOS token and nothing else; all groups share it."""
    return [_group([1], tokens(3, 130), tokens(1, 131)), _group([1], tokens(2, 132), tokens(4, 133))]


def many_responses() -> list[Group]:
    """One hundred responses to one prompt."""
    return [_group(tokens(8, 140), *(tokens(1 + i % 3, 141 + i) for i in range(100)))]


def different_scoring() -> list[Group]:
    """Sequences share tokens that only some of them score; gaps in the scoring; one sequence scores nothing."""
    prompt, opening = tokens(5, 300), tokens(4, 301)
    first, second = prompt + opening + tokens(3, 302), prompt + opening + tokens(2, 303)
    third = prompt + tokens(4, 304)
    return [
        Group(
            [
                Sequence(first, [i >= 5 for i in range(len(first))]),
                Sequence(second, [i >= 7 and i % 2 == 1 for i in range(len(second))]),
                Sequence(third, [0 < i < 8 for i in range(len(third))]),
                Sequence(first, [i == 1 for i in range(len(first))]),
                Sequence(second, [False] * len(second)),
            ]
        )
    ]


def branching_everywhere() -> list[Group]:
    """Token ids from an alphabet of two: sharing at every offset, far deeper than five levels."""
    generator = random.Random(5)
    groups = []
    for _ in range(3):
        prompt = [generator.choice((5, 6)) for _ in range(generator.randint(1, 4))]
        responses = [[generator.choice((5, 6)) for _ in range(generator.randint(1, 7))] for _ in range(4)]
        groups.append(_group(prompt, *responses))
    return groups


SCENARIOS: dict[str, Callable[[], list[Group]]] = {
    builder.__name__: builder
    for builder in (
        pairs,
        story_questions_answers,
        five_levels,
        shared_system_prompt,
        single_responses,
        identical_responses,
        nested_responses,
        attempts,
        calls,
        nothing_shared,
        one_token_prompts,
        many_responses,
        different_scoring,
        branching_everywhere,
    )
}
