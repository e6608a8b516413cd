"""Steps gather groups that begin alike, in the sense in which the model shares prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpref.data import PreferenceDataset
from kvpref.plan.passes import Reads
from kvpref.records.groups import Group, Sequence
from kvpref.training import PreferenceTrainingArguments
from kvpref.training.loading.batcher import make_batcher


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
