"""Runs of a tree, against what the sequences themselves say of every position."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from kvpref import Group, Sequence, collate
from kvpref.data.tree_picture.runs import Run, children_of, find_runs

PROMPT, TRUNK = list(range(100, 120)), list(range(200, 220))


def sequence(prompt: list[int], response: list[int]) -> Sequence:
    return Sequence.from_prompt_and_response(prompt, response)


def runs_of(*sequences: Sequence) -> tuple[Run, ...]:
    return find_runs(collate([Group(sequences)], min_shared_tokens=1).tree, sequences)


def test_a_run_ends_where_sequences_part_or_end() -> None:
    runs = runs_of(
        sequence(PROMPT, [*TRUNK, 1, 2]),
        sequence(PROMPT, [3]),
        sequence(PROMPT, TRUNK),
        sequence(PROMPT, [*TRUNK, 4, 5, 6]),
    )
    found = {(run.start, run.stop, run.holders): run for run in runs}
    assert set(found) == {
        (0, 20, (0, 1, 2, 3)), (20, 40, (0, 2, 3)), (40, 42, (0,)), (40, 43, (3,)), (20, 21, (1,))
    }  # fmt: skip
    trunk = found[20, 40, (0, 2, 3)]
    assert (trunk.ending, trunk.ends_inside, trunk.scored) == ((2,), True, ((20, 40),))
    assert found[0, 20, (0, 1, 2, 3)].scored == ()
    assert not found[20, 21, (1,)].ends_inside
    children = children_of(runs)
    (root,) = children[None]
    assert [runs[index].holders for index in children[root]] == [(0, 2, 3), (1,)]


def test_segments_that_go_on_are_cut() -> None:
    """A child may leave its parent's segment before its end, and a sequence may end inside one."""
    whole = SimpleNamespace(parent=None, depth=0, start=0, input_ids=(1, 2, 3, 4, 5, 6))
    branch = SimpleNamespace(parent=0, depth=1, start=4, input_ids=(7, 8))
    tree: Any = SimpleNamespace(segments=(whole, branch), paths=((0,), (0,), (0, 1)))
    sequences = (sequence([1, 2], [3, 4, 5, 6]), sequence([1], [2]), sequence([1, 2, 3], [4, 7, 8]))
    runs = find_runs(tree, sequences)
    assert [(run.parent, run.start, run.stop, run.holders, run.ending) for run in runs] == [
        (None, 0, 2, (0, 1, 2), (1,)), (0, 2, 4, (0, 2), ()), (1, 4, 6, (0,), (0,)), (1, 4, 6, (2,), (2,))
    ]  # fmt: skip
    # Position 1 is scored by sequence 1 alone, position 2 by sequence 0 alone.
    assert [run.scored for run in runs] == [((1, 2),), ((2, 4),), ((4, 6),), ((4, 6),)]


@pytest.mark.parametrize("seed", range(10))
def test_every_token_is_in_one_run_of_its_sequence(seed: int) -> None:
    generator = random.Random(seed)
    sequences = [
        Sequence(ids, [False, *generator.choices([False, True], k=len(ids) - 1)])
        for ids in ([generator.randrange(2) for _ in range(generator.randrange(2, 12))] for _ in range(9))
    ]
    runs = runs_of(*sequences)
    for number, own in enumerate(sequences):
        held = [run for run in runs if number in run.holders]
        assert [place for run in held for place in range(run.start, run.stop)] == list(range(len(own)))
        assert [run.stop for run in held if number in run.ending] == [len(own)]
    for index, run in enumerate(runs):
        assert len({sequences[number].input_ids[: run.stop] for number in run.holders}) == 1
        flags = [any(sequences[number].scored[place] for number in run.holders) for place in range(run.start, run.stop)]
        assert run.num_scored == sum(flags)
        assert run.parent is None or (run.parent < index and runs[run.parent].stop == run.start)
    assert sum(map(len, runs)) == collate([Group(sequences)], min_shared_tokens=1).num_unique_tokens
