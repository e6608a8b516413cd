"""What a rule accepts and says."""

from __future__ import annotations

import pytest

from kvpref.prefix.rules import CAUSAL, Rule


def test_the_first_visible_key_of_each_rule() -> None:
    assert [CAUSAL.first_key(q) for q in range(4)] == [0, 0, 0, 0]
    assert [Rule("window", 2).first_key(q) for q in range(5)] == [0, 0, 1, 2, 3]
    assert [Rule("chunk", 3).first_key(q) for q in range(8)] == [0, 0, 0, 3, 3, 3, 6, 6]


@pytest.mark.parametrize(("kind", "size"), [("window", 0), ("chunk", -1), ("causal", 3), ("dense", 1), ("near", 0)])
def test_impossible_rules_are_refused(kind: str, size: int) -> None:
    with pytest.raises(ValueError, match="rule"):
        Rule(kind, size)


def test_rules_compare_by_value_and_say_what_they_are() -> None:
    assert len({Rule("window", 4), Rule("window", 4), Rule("chunk", 4)}) == 2
    assert str(Rule("window", 4)) == "window of 4"
    assert str(CAUSAL) == "causal"
