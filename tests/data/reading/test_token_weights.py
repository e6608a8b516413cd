"""Weights of tokens from data: where they may stand, and on which tokens they fall."""

from __future__ import annotations

from typing import Any

import pytest
from agent_templates import PLAIN, THINKS, build_agent_tokenizer, conversation, say

from kvpref.data import DataOptions, load_preferences
from kvpref.data.reading.messages import RowError
from kvpref.data.reading.token_weights import with_token_weights
from kvpref.errors import InputError
from kvpref.records.groups import Group, Sequence


def talk(answer: str) -> list[dict[str, Any]]:
    """Two turns of two tokens each, the second being its end."""
    return [say("user", "x"), say("assistant", answer), say("user", "y"), say("assistant", "z")]


def load(rows: list[dict[str, Any]], template: str = PLAIN, **options: Any) -> Group:
    return load_preferences(rows, build_agent_tokenizer(template), DataOptions(**options))[0]


def weights_of(group: Group) -> list[list[tuple[float, ...] | None]]:
    return [[part.weights for part in sequence.parts] for sequence in group.sequences]


def attempts(*weights: Any, **more: Any) -> list[dict[str, Any]]:
    own = [{"messages": talk(answer), "token_weights": given} for answer, given in zip("ab", weights, strict=True)]
    return [{"id": "t", "trajectories": own, **more}]


@pytest.mark.parametrize(
    "rows",
    [
        attempts([1, 3], [0, 1, 2, 0.5]),
        [
            {
                "id": "t",
                "trajectories": [{"messages": talk(answer)} for answer in "ab"],
                "token_weights": [[1, 3], [0, 1, 2, 0.5]],
            }
        ],
        [
            {
                "id": "t",
                "attempt": answer,
                "messages": talk(answer)[:place],
                "response": talk(answer)[place],
                "token_weights": given,
            }
            for answer, place, given in (("a", 1, 1), ("a", 3, 3), ("b", 1, [0, 1]), ("b", 3, [2, 0.5]))
        ],
    ],
)
def test_trajectories_by_turn_and_by_token(rows: list[dict[str, Any]]) -> None:
    group = load(rows)
    assert weights_of(group) == [[(1.0, 1.0, 3.0, 3.0)], [(0.0, 1.0, 2.0, 0.5)]]
    assert not group.columns


def test_pairs_and_groups() -> None:
    pair = {"prompt": "q", "chosen": "ab", "rejected": "c", "token_weights": [[1, 2, 3], 2]}
    several = {"prompt": "q", "responses": ["ab", "c"], "scores": [1, 0], "token_weights": [None, [0, 1]]}
    # The end of a response is a token of it.
    assert weights_of(load([pair])) == [[(1.0, 2.0, 3.0)], [(2.0, 2.0)]]
    assert weights_of(load([several])) == [[None], [(0.0, 1.0)]]


def test_rewritten_histories_have_their_own_turns_weights() -> None:
    talked = conversation("warm", thinks=True)
    group = load([{"id": "t", "trajectories": [{"messages": talked, "token_weights": [1, 2, 3, 4]}]}], THINKS)
    # Two turns behind the first question are scored in one row.
    assert [sorted(set(weights or ())) for weights in weights_of(group)[0]] == [[1.0, 2.0], [3.0], [4.0]]


def test_weights_of_turns_that_are_cut_go_with_them() -> None:
    assert weights_of(load(attempts([1, 3], [2, 4]), max_response_tokens=3)) == [[(1.0, 1.0)], [(2.0, 2.0)]]
    assert weights_of(load(attempts([1, 3], [2, 4]), trajectory_groups="turn")) == [[(1.0, 1.0)], [(2.0, 2.0)]]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            [1, 2, 3],
            r"row 1: `token_weights\[0\]` has 3 entries; expected a number, one per turn \(2\), or one per sco",
        ),
        ([1, -1], r"row 1: `token_weights\[0\]\[1\]` is -1; expected a finite number of at least 0"),
        (float("nan"), r"row 1: `trajectories\[0\]\.token_weights` is nan; expected a finite number"),
        ("x", r"row 1: `token_weights\[0\]` must be a number, found string"),
        (True, r"row 1: `token_weights\[0\]` must be a number, found boolean"),
    ],
)
def test_wrong_weights_are_bad_rows(entry: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(attempts(entry, 1))


def test_one_entry_per_response() -> None:
    sequence = Sequence.from_prompt_and_response([1], [2, 3])
    with pytest.raises(RowError, match="must be a list with one entry for each of the 2 responses"):
        with_token_weights(Group([sequence] * 2, columns={"token_weights": [1, 2, 3]}))


def test_a_loss_cannot_read_them_as_its_column() -> None:
    with pytest.raises(InputError, match="weighs tokens under every loss"):
        DataOptions(columns=("token_weights",))
