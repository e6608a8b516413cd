"""The closed form of FLOPs against PyTorch's own counter, and its counts against brute force."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from sample_groups import SCENARIOS, five_levels, pairs
from tiny_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode

import kvpref
from kvpref.models.shape import model_shape
from kvpref.ops.attention import AttentionParams, VarlenBlock, get_backend
from kvpref.plan.flops import Flops, ModelShape, Work, count_work, total_work
from kvpref.plan.passes import MODES
from kvpref.prefix.levels import VarlenLayout

MATRIX_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "granite", "phi3"])
def test_linear_layers_and_head_are_what_the_counter_sees(family: str, mode: str) -> None:
    """Exactly: attention is another operator, and the rotary embedding's outer product a batched one."""
    model = kvpref.attach(tiny_model(family, torch.float32))
    batch = kvpref.collate(five_levels() + pairs(), min_shared_tokens=1)
    with FlopCounterMode(display=False) as counter:
        kvpref.response_logps(model, batch, mode=mode).token_logps.sum().backward()
    by_operator = counter.get_flop_counts()["Global"]
    flops = model_shape(model).flops(count_work(batch.plan(mode)))
    assert sum(by_operator.get(operator, 0) for operator in MATRIX_PRODUCTS) == flops.linear + flops.head


@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [((0, 5, 12), (0, 5, 12), True), ((0, 3, 3, 10), (0, 5, 9, 20), False)],
    ids=["self", "cross"],
)
def test_attention_is_seven_products_per_pair(queries: tuple[int, ...], keys: tuple[int, ...], causal: bool) -> None:
    """The dense reference computes both halves of a causal block: its pairs are all of (queries x keys)."""
    block = VarlenBlock.from_layout(
        VarlenLayout(cu_seqlens_q=queries, cu_seqlens_k=keys, shape="causal" if causal else "rectangle")
    )
    params, backend = AttentionParams(scale=0.3), get_backend("reference")
    num_heads, num_kv_heads, head_dim = 4, 2, 6
    q, dout = torch.randn(queries[-1], num_heads, head_dim), torch.randn(queries[-1], num_heads, head_dim)
    k, v = torch.randn(keys[-1], num_kv_heads, head_dim), torch.randn(keys[-1], num_kv_heads, head_dim)
    with FlopCounterMode(display=False) as counter:
        out, lse = backend.forward(q, k, v, block, params)
        backend.backward(dout, q, k, v, out, lse, block, params)
    lengths = zip(pairwise(queries), pairwise(keys), strict=True)
    dense_pairs = sum((q1 - q0) * (k1 - k0) for (q0, q1), (k0, k1) in lengths)
    layer = ModelShape(
        linear_weights=0, num_layers=1, num_heads=num_heads, head_dim=head_dim, hidden_size=24, vocab_size=7
    )
    assert counter.get_total_flops() == layer.flops(Work(0, dense_pairs, 0)).attention


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_work_against_brute_force(scenario: str) -> None:
    """A token that runs attends to itself and to everything before it on its path, once per head and layer."""
    groups = SCENARIOS[scenario]()
    batch = kvpref.collate(groups, min_shared_tokens=1)
    rows = [sequence.input_ids for group in groups for sequence in group.sequences]
    distinct = {row[: end + 1] for row in rows for end in range(len(row))}
    scored = {
        sequence.input_ids[: end + 1]
        for group in groups
        for sequence in group.sequences
        for end in range(len(sequence))
        if sequence.scored[end]
    }
    width = max(map(len, rows))
    shared = Work(len(distinct), sum(map(len, distinct)), len(scored))
    num_scored = sum(sum(sequence.scored) for group in groups for sequence in group.sequences)
    packed = Work(sum(map(len, rows)), sum(len(row) * (len(row) + 1) // 2 for row in rows), num_scored)
    assert count_work(batch.plan("two_pass")) == shared
    assert count_work(batch.plan("one_pass")) == shared
    assert count_work(batch.plan("packed")) == packed
    assert count_work(batch.plan("padded")) == Work(len(rows) * width, len(rows) * width**2, num_scored)


def test_counts_add_up() -> None:
    assert total_work([Work(1, 2, 3), Work(10, 20, 30)]) == Work(11, 22, 33)
    assert total_work([]) == Work(0, 0, 0)
    assert Flops(linear=1, attention=20, head=300).total == 321
