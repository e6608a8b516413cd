"""The plans of every mode: what they run, and that they agree on what is scored."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from token_lists import scored_token_lists

from kvpref.plan.modes import MODES, build_plan
from kvpref.plan.passes import ModePlan
from kvpref.prefix.building import build_tree
from kvpref.records.groups import Sequence
from kvpref.records.tensor_fields import tensors_to

Scored = tuple[list[tuple[int, ...]], list[tuple[bool, ...]]]


def plans_of(scored: Scored) -> dict[str, ModePlan]:
    sequences = [Sequence(ids, flags) for ids, flags in zip(*scored, strict=True)]
    tree = build_tree(scored[0])
    return {mode: build_plan(mode, sequences, tree) for mode in MODES}


def test_the_modes() -> None:
    assert MODES == ("two_pass", "one_pass", "packed", "padded")


@given(scored_token_lists())
def test_every_mode_scores_the_same_tokens_in_the_same_order(scored: Scored) -> None:
    expected = [
        token for ids, flags in zip(*scored, strict=True) for token, flag in zip(ids, flags, strict=True) if flag
    ]
    for plan in plans_of(scored).values():
        assert plan.targets[plan.token_index].tolist() == expected
        assert plan.cu_seqlens.diff().tolist() == [sum(flags) for flags in scored[1]]
        assert plan.max_sequence_tokens == max(map(len, scored[0]))
        assert plan.num_forward_tokens == sum(item.input_ids.numel() for item in plan.passes)


@given(scored_token_lists())
def test_every_predictor_row_holds_the_token_and_position_before_its_target(scored: Scored) -> None:
    expected = [
        (ids[position - 1], position - 1)
        for ids, flags in zip(*scored, strict=True)
        for position, flag in enumerate(flags)
        if flag
    ]
    for plan in plans_of(scored).values():
        found = []
        for item in plan.passes:
            ids, positions = item.input_ids.flatten(), item.position_ids.flatten()
            assert item.input_ids.shape == item.position_ids.shape
            found += [(int(ids[row]), int(positions[row])) for row in item.predictor_rows]
        assert [found[index] for index in plan.token_index.tolist()] == expected


@given(scored_token_lists())
def test_token_counts(scored: Scored) -> None:
    plans = plans_of(scored)
    unique = len({ids[:end] for ids in scored[0] for end in range(1, len(ids) + 1)})
    assert plans["two_pass"].num_forward_tokens == plans["one_pass"].num_forward_tokens == unique
    assert plans["packed"].num_forward_tokens == sum(map(len, scored[0]))
    assert plans["padded"].num_forward_tokens == len(scored[0]) * max(map(len, scored[0]))
    assert len(plans["two_pass"].passes) == build_tree(scored[0]).num_levels
    assert len(plans["one_pass"].passes) == len(plans["packed"].passes) == len(plans["padded"].passes) == 1


@given(scored_token_lists())
def test_padded_rows_are_padded_on_the_right(scored: Scored) -> None:
    item = plans_of(scored)["padded"].passes[0]
    for row, ids in enumerate(scored[0]):
        assert item.input_ids[row, : len(ids)].tolist() == list(ids)
        assert item.attention_mask is not None
        assert item.attention_mask[row].tolist() == [1] * len(ids) + [0] * (item.input_ids.shape[1] - len(ids))


def test_unknown_mode_lists_the_modes() -> None:
    with pytest.raises(ValueError, match=r"'three_pass'; choose from: two_pass, one_pass, packed, padded"):
        build_plan("three_pass", [Sequence([5], [False])], build_tree([(5,)]))


def all_tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in all_tensors(item)]
    if dataclasses.is_dataclass(value):
        moving = [f for f in dataclasses.fields(value) if f.name not in ("host_offsets", "predictor_rows_on_host")]
        return [tensor for field in moving for tensor in all_tensors(getattr(value, field.name))]
    return []


@pytest.mark.parametrize("mode", MODES)
def test_moving_a_plan_moves_every_tensor(mode: str) -> None:
    lists = [(5, 6, 7), (5, 6, 8), (5, 9)]
    plan = build_plan(mode, [Sequence(ids, [False] + [True] * (len(ids) - 1)) for ids in lists], build_tree(lists))
    moved = tensors_to(plan, "meta")
    assert all_tensors(plan)
    assert {tensor.device.type for tensor in all_tensors(moved)} == {"meta"}
    assert [t.shape for t in all_tensors(moved)] == [t.shape for t in all_tensors(plan)]
    assert {tensor.device.type for tensor in all_tensors(plan)} == {"cpu"}
    blocks = [block for item in moved.passes for level in item.levels for block in level.blocks]
    assert all(str(getattr(block.host_offsets, "device", "")) == "cpu" for block in blocks), (
        "read on the host, wherever the others are"
    )


def test_only_dataclasses_are_moved() -> None:
    with pytest.raises(TypeError, match="list"):
        tensors_to([torch.zeros(1)], "cpu")
