"""Steps gather groups that begin alike, in the sense in which the model shares prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpref.data import PreferenceDataset
from kvpref.plan.passes import Reads
from kvpref.records.groups import Group, Sequence
from kvpref.training import PreferenceTrainingArguments
from kvpref.training.loading import batcher as module
from kvpref.training.loading.batcher import make_batcher, where_ranks_wait


def group(*prompt: int) -> Group:
    return Group([Sequence.from_prompt_and_response(prompt, [response]) for response in (1, 2)])


@pytest.mark.parametrize(("spans", "shared"), [("none", (7, 0, 0, 7)), ("images", (7, 0, 0, 7)), ("prompts", (0,) * 4)])
def test_models_that_share_only_whole_prompts_gather_only_equal_ones(
    tmp_path: Path, spans: str, shared: tuple[int, ...]
):
    story = [5] * 7
    groups = PreferenceDataset([group(*story, 8), group(9, 9), group(7, 7), group(*story, 9)])
    args = PreferenceTrainingArguments(output_dir=str(tmp_path), min_shared_tokens=2, use_cpu=True)
    batcher = make_batcher(groups, args, Reads(spans=spans), groups_per_device=2, shuffle=False)
    assert batcher.clusters is not None
    assert batcher.clusters.shared_tokens == shared


@pytest.mark.parametrize(
    ("world_size", "schedule", "gathers", "kept", "waits"),
    [
        (1, "full", True, "chunk", "step"),
        (4, "full", True, "chunk", "micro_batch"),
        (4, "full", False, "chunk", "step"),
        (4, "bounded", True, "chunk", "pass"),
        (4, "bounded", True, "step", "step"),
        (4, "bounded", False, "chunk", "step"),
    ],
)
def test_ranks_wait_where_weights_are_gathered(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    world_size: int,
    schedule: str,
    gathers: bool,
    kept: str,
    waits: str,
):
    monkeypatch.setattr(module, "gathers_in_passes", lambda: gathers)
    args = PreferenceTrainingArguments(
        output_dir=str(tmp_path), schedule=schedule, use_cpu=True, gather_weights=kept, reduce_grads=kept
    )
    monkeypatch.setattr(PreferenceTrainingArguments, "world_size", world_size)
    assert where_ranks_wait(args) == waits
    groups = PreferenceDataset([group(number, 1) for number in range(8)])
    assert make_batcher(groups, args, groups_per_device=2, shuffle=False).options.waits == waits
