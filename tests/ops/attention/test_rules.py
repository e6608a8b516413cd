"""Windows and chunks of prefix trees, as planned, on backends: against dense attention with the rule as a mask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attention_layouts import attend
from dense_attention import make_inputs, random_tree, visible
from stand_in_backends import STAND_INS, running_on_stand_in

from kvpref.ops.attention import AttentionParams, CascadePlan, VarlenBlock, cascade_attention
from kvpref.prefix.building import build_tree
from kvpref.prefix.levels import build_levels
from kvpref.prefix.rules import Rule
from kvpref.prefix.runs import Runs
from kvpref.prefix.shapes import blocks_under
from kvpref.prefix.tree import PrefixTree

RULES = [Rule(kind, size) for kind in ("window", "chunk") for size in (1, 2, 3, 5)]


@pytest.fixture(params=["tiled", "cpu_flash", "cuda_flash", "efficient"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With native windows and without, with ranges of keys and without."""
    yield from _runnable(request, monkeypatch)


@pytest.fixture(params=["reference", "tiled", "cpu_flash", *STAND_INS])
def any_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from _runnable(request, monkeypatch)


def _runnable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param not in STAND_INS:
        yield request.param
        return
    with running_on_stand_in(request.param, monkeypatch) as name:
        yield name


def positions(tree: PrefixTree, depth: int) -> torch.Tensor:
    """(T_d,) inside the sequences."""
    return torch.tensor(
        [segment.start + i for segment in tree.segments if segment.depth == depth for i in range(len(segment))]
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_trees_under_rules_equal_masked_attention(rule: Rule, backend: str) -> None:
    check(random_tree(2, num_sequences=14), rule, backend)


BOTH_WAYS = [
    Rule("causal", bidirectional=True),
    Rule("window", 4, bidirectional=True),
    Rule("window", 4, bidirectional=True, whole_spans=True),
]


@pytest.mark.parametrize("rule", BOTH_WAYS, ids=["causal", "window", "whole"])
def test_trees_with_spans_equal_masked_attention(rule: Rule, any_backend: str) -> None:
    images = [tuple(range(10 * key, 10 * key + length)) for key, length in ((1, 1), (2, 2), (3, 7), (4, 9))]
    prompts = [(1, 2, *images[3], 1, *images[1]), (*images[2], 2, *images[0]), (1, 2)]
    middles = [(5, *images[2]), (6, 5), ()]
    sequences = [
        (*prompt, *middle, end, 5, 6, *images[1]) for prompt in prompts for middle in middles for end in (7, 8)
    ]
    check(build_tree(sequences), rule, any_backend, [_runs_of(sequence) for sequence in sequences])


def _runs_of(sequence: tuple[int, ...]) -> Runs:
    """Where images stand: each has tokens of its own, from a multiple of ten on."""
    starts = [place for place, token in enumerate(sequence) if token >= 10 and token % 10 == 0]
    return tuple((first, first + _longest(sequence[first:])) for first in starts)


def _longest(tokens: tuple[int, ...]) -> int:
    return next((n for n, token in enumerate(tokens) if token != tokens[0] + n), len(tokens))


def check(tree: PrefixTree, rule: Rule, backend: str, spans: list[Runs] | None = None) -> None:
    """Outputs and gradients of every level."""
    for depth, level in enumerate(build_levels(tree, spans)):
        inputs = make_inputs(tree, depth, 4, 2, 8)
        blocks = tuple(VarlenBlock.from_layout(layout) for layout in blocks_under(level, rule))
        plan = CascadePlan(blocks=blocks, params=AttentionParams(scale=0.4), backend=backend)
        out = cascade_attention(inputs.query, inputs.key, inputs.value, inputs.prefixes, plan)
        keys = torch.cat([positions(tree, above) for above in range(depth + 1)])
        first = torch.tensor([rule.first_key(int(position)) for position in positions(tree, depth)])
        seen = visible(tree, depth) & (keys >= first.unsqueeze(1))
        if rule.bidirectional:
            own = seen[:, len(keys) - level.num_rows :]  # a view
            for start, stop in level.spans:
                square = torch.ones(stop - start, stop - start, dtype=torch.bool)
                own[start:stop, start:stop] |= square if rule.whole_spans else square.triu()
        truth = attend(inputs.query, [*inputs.prefixes, (inputs.key, inputs.value)], seen, 0.4)
        torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)  # float64 sums of at most a hundred terms
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        grads = (torch.autograd.grad(result, inputs.leaves(), dout, materialize_grads=True) for result in (out, truth))
        for grad, true_grad in zip(*grads, strict=True):
            torch.testing.assert_close(grad, true_grad, rtol=0, atol=1e-11)
