"""Every mode, family, tree and dtype against the naive oracle: log-probs and every parameter's gradient."""

from __future__ import annotations

import functools
from typing import Any

import oracle
import pytest
import torch
from pairwise import pairwise
from sample_groups import SCENARIOS, five_levels, pairs, story_questions_answers
from tiny_models import VARIANTS, tiny_model
from torch import nn

import kvpref

MODES = ("two_pass", "one_pass", "packed", "padded")

# float64 throughout (see `oracle.true_float64`): only the order of additions differs, some 1e3 operations deep, each
# with a rounding error of 1e-16. Measured: 9e-15.
FP64_TOLERANCE = 1e-10
# float32 rounds at 6e-8; norms and softmax of 2 to 3 layers amplify that by some tens. Measured: 2e-6.
FP32_TOLERANCE = 1e-5


@functools.cache
def truth(variant: str, scenario: str) -> oracle.Result:
    """The oracle in float64; what dtypes, modes and options are compared with."""
    return oracle.naive(tiny_model(variant, torch.float64), SCENARIOS[scenario]())


def attached(variant: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> nn.Module:
    return kvpref.attach(tiny_model(variant, dtype, **overrides))


@pytest.mark.parametrize(("variant", "mode", "layers"), pairwise(VARIANTS, MODES, ("plain", "checkpointed")))
def test_fp64_families(variant: str, mode: str, layers: str) -> None:
    model = attached(variant)
    if layers == "checkpointed":
        oracle.checkpoint_layers(model)
    batch = kvpref.collate(five_levels(), min_shared_tokens=1)
    assert batch.tree.num_levels == 3
    assert batch.tree.branches_inside
    oracle.assert_same(oracle.shared(model, batch, mode=mode), truth(variant, "five_levels"), FP64_TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_families(variant: str, mode: str) -> None:
    batch = kvpref.collate(story_questions_answers(), min_shared_tokens=1)
    found = oracle.shared(attached(variant, torch.float32), batch, mode=mode)
    oracle.assert_same(found, truth(variant, "story_questions_answers"), FP32_TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_fp64_scenarios(scenario: str, mode: str) -> None:
    batch = kvpref.collate(SCENARIOS[scenario](), min_shared_tokens=1)
    oracle.assert_same(oracle.shared(attached("llama"), batch, mode=mode), truth("llama", scenario), FP64_TOLERANCE)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_checkpointed_scenarios(scenario: str) -> None:
    model = attached("qwen3")
    oracle.checkpoint_layers(model)
    batch = kvpref.collate(SCENARIOS[scenario](), min_shared_tokens=1)
    oracle.assert_same(oracle.shared(model, batch), truth("qwen3", scenario), FP64_TOLERANCE)


@pytest.mark.parametrize("limits", [{"max_depth": 0}, {"max_depth": 1}, {"max_depth": 2}, {"min_shared_tokens": 5}, {}])
@pytest.mark.parametrize("mode", ["two_pass", "one_pass"])
@pytest.mark.parametrize("scenario", ["five_levels", "branching_everywhere", "different_scoring"])
def test_tree_limits_do_not_change_results(scenario: str, mode: str, limits: dict[str, int]) -> None:
    batch = kvpref.collate(SCENARIOS[scenario](), **{"min_shared_tokens": 1, **limits})
    oracle.assert_same(oracle.shared(attached("llama"), batch, mode=mode), truth("llama", scenario), FP64_TOLERANCE)


@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
@pytest.mark.parametrize("variant", ["llama", "gemma", "stablelm"])
def test_backends(variant: str, backend: str) -> None:
    batch = kvpref.collate(five_levels(), min_shared_tokens=1)
    found = oracle.shared(attached(variant), batch, backend=backend)
    oracle.assert_same(found, truth(variant, "five_levels"), FP64_TOLERANCE)


def test_result_is_float32_in_the_callers_order() -> None:
    groups = pairs()
    logps = kvpref.response_logps(attached("llama", torch.float32), kvpref.collate(groups, min_shared_tokens=1))
    assert logps.token_logps.dtype == torch.float32
    lengths = [sum(sequence.scored) for group in groups for sequence in group.sequences]
    assert logps.lengths().tolist() == lengths
    assert logps.group_index.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    by_sequence = logps.token_logps.split(lengths)
    # Both sides add the same float32 numbers; only the order may differ.
    torch.testing.assert_close(logps.sum(), torch.stack([share.sum() for share in by_sequence]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logps.mean(), torch.stack([share.mean() for share in by_sequence]), rtol=1e-6, atol=1e-6)


def bf16_run(kind: str, engine: bool) -> tuple[oracle.Result, oracle.Result]:
    """A run in bf16 (weights, or autocast over float32 weights) and its float64 truth."""
    model = tiny_model("llama", torch.bfloat16 if kind == "weights" else torch.float32)
    groups = SCENARIOS["five_levels"]() + SCENARIOS["pairs"]()
    exact = oracle.naive(oracle.twin(model, torch.float64), groups)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        if not engine:
            return oracle.naive(model, groups), exact
        return oracle.shared(kvpref.attach(model), kvpref.collate(groups, min_shared_tokens=1)), exact


@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_bf16_is_no_worse_than_naive_bf16(kind: str) -> None:
    """Both runs round to bf16 (3e-3) in different places, so neither is the other's reference: fp64 judges both.

    A factor of 2 over whole tensors is far above the scatter between two roundings of the same sums, and far below
    what a lost term would cost.
    """
    (found, exact), (baseline, _) = bf16_run(kind, engine=True), bf16_run(kind, engine=False)
    assert oracle.relative_error(found.token_logps, exact.token_logps) <= 2 * oracle.relative_error(
        baseline.token_logps, exact.token_logps
    )
    for name, grad in exact.grads.items():
        if grad.ndim > 1:
            allowed = 2 * oracle.relative_error(baseline.grads[name], grad)
            assert oracle.relative_error(found.grads[name], grad) <= allowed, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_groups_never_leak(mode: str, dtype: torch.dtype) -> None:
    """Change every token of one group (same lengths): the other groups' log-probs stay the same bits."""
    model = attached("llama", dtype).eval()
    groups = pairs()
    other = [
        kvpref.Sequence([(token + 17) % 90 + 3 for token in sequence.input_ids], sequence.scored)
        for sequence in groups[1].sequences
    ]
    before, after = (
        kvpref.response_logps(model, kvpref.collate(changed, min_shared_tokens=1), mode=mode)
        for changed in (groups, [groups[0], kvpref.Group(other), groups[2]])
    )
    in_changed = torch.repeat_interleave(before.group_index == 1, before.lengths())
    assert torch.equal(before.token_logps[~in_changed], after.token_logps[~in_changed])
    assert not torch.equal(before.token_logps[in_changed], after.token_logps[in_changed])
