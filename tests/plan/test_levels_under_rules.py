"""Levels under other rules than causal: planned once, where the pass is, and no more pairs than the mask has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from token_lists import scored_token_lists
from torch._subclasses import FakeTensorMode

from kvpref.integrations.shared_prefix.padded_rows import PaddedRows, share_rows
from kvpref.plan.chunks import build_step_chunks
from kvpref.plan.modes import build_plan
from kvpref.plan.passes import PassPlan
from kvpref.prefix.building import build_tree
from kvpref.prefix.rules import CAUSAL, Rule
from kvpref.records.groups import Sequence
from kvpref.records.tensor_fields import tensors_to

Scored = tuple[list[tuple[int, ...]], list[tuple[bool, ...]]]

RULES = [Rule("window", 1), Rule("window", 3), Rule("chunk", 2), Rule("chunk", 5), CAUSAL]


def num_pairs(item: PassPlan, rule: Rule) -> int:
    return sum(block.num_attended_pairs for level in item.levels_under(rule) for block in level.blocks)


def num_seen(item: PassPlan, rule: Rule) -> int:
    """What the rows of a pass see, by their positions."""
    return sum(position - rule.first_key(position) + 1 for position in item.position_ids.flatten().tolist())


@given(scored_token_lists(), st.sampled_from(RULES), st.integers(1, 9))
def test_every_token_sees_what_the_rule_lets_it_see(scored: Scored, rule: Rule, max_tokens: int) -> None:
    sequences = [Sequence(ids, flags) for ids, flags in zip(*scored, strict=True)]
    tree = build_tree(scored[0])
    chunks = build_step_chunks([sequences], tree, max_tokens=max_tokens)
    width = max(map(len, sequences))
    padded = np.array([[0] * (width - len(s)) + list(s.input_ids) for s in sequences])
    mask = np.array([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    rows = PaddedRows.read(padded, mask, position_ids=None)
    passes = [
        *(item for mode in ("two_pass", "one_pass", "packed") for item in build_plan(mode, sequences, tree).passes),
        *(chunk.item for chunk in chunks.all),
        share_rows(rows, by_position=False, min_shared_tokens=1, max_depth=4).item,
    ]
    for item in passes:
        assert num_pairs(item, rule) == num_seen(item, rule)


def test_positions_of_padded_rows_count_from_their_first_token() -> None:
    # Masks of transformers do, whatever position ids say.
    rows = PaddedRows.read(
        np.array([[0, 1, 2, 3], [0, 1, 2, 4]]), np.array([[0, 1, 1, 1]] * 2), np.arange(5, 9)[None].repeat(2, axis=0)
    )
    item = share_rows(rows, by_position=True, min_shared_tokens=1, max_depth=4).item
    assert item.position_ids.tolist() == [[6, 7, 8, 8]]
    assert num_pairs(item, Rule("chunk", 2)) == 1 + 2 + 1 + 1


@pytest.fixture
def item() -> PassPlan:
    sequences = [Sequence((*range(9), last), (False,) * 9 + (True,)) for last in (20, 21)]
    return build_plan("two_pass", sequences, build_tree([s.input_ids for s in sequences])).passes[1]


def test_levels_are_planned_once_and_share_blocks_that_stay_as_they_are(item: PassPlan) -> None:
    levels = item.levels_under(Rule("window", 4))
    assert item.levels_under(Rule("window", 4)) is levels
    assert item.levels_under(CAUSAL) is item.levels
    assert levels[0].blocks[0] is item.levels[0].blocks[0]
    assert levels[0].blocks[1] is not item.levels[0].blocks[1]
    wide = item.levels_under(Rule("window", 10))
    assert all(a is b for a, b in zip(wide[0].blocks, item.levels[0].blocks, strict=True))


def test_levels_are_planned_where_the_pass_is(item: PassPlan) -> None:
    rule = Rule("window", 4)
    item.levels_under(rule)
    elsewhere = tensors_to(item, "meta")
    assert {block.cu_seqlens_k.device.type for block in elsewhere.levels_under(rule)[0].blocks} == {"meta"}


def test_levels_planned_while_the_model_runs_are_real_and_may_be_read_in_a_backward_pass(item: PassPlan) -> None:
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
        block = item.levels_under(Rule("chunk", 4))[0].blocks[1]
    assert type(block.cu_seqlens_q) is torch.Tensor
    assert not block.cu_seqlens_q.is_inference()
