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
from kvpref.plan.flops import AttentionShape, Flops, ModelShape, Work, count_work, total_work
from kvpref.plan.modes import MODES
from kvpref.prefix.blocks import VarlenLayout
from kvpref.prefix.rules import CAUSAL, Rule

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
    layer = AttentionShape(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, value_dim=head_dim)
    assert counter.get_total_flops() == layer.pair_flops * dense_pairs


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


def test_work_under_rules_is_what_positions_say() -> None:
    batch = kvpref.collate(five_levels() + pairs(), min_shared_tokens=1)
    rules = (Rule("window", 3), Rule("chunk", 4), CAUSAL)
    for mode in ("two_pass", "one_pass", "packed"):
        plan = batch.plan(mode)
        work = count_work(plan, rules)
        positions = [position for item in plan.passes for position in item.position_ids.flatten().tolist()]
        for rule in rules:
            assert work.pairs_under(rule) == sum(position - rule.first_key(position) + 1 for position in positions)
    padded = count_work(batch.plan("padded"), rules)
    assert {padded.pairs_under(rule) for rule in rules} == {padded.num_pairs}  # what is masked is computed


def test_flops_of_layers_of_several_kinds() -> None:
    window = Rule("window", 3)
    wide = AttentionShape(num_layers=2, num_heads=4, num_kv_heads=1, head_dim=6, value_dim=5)
    near = AttentionShape(num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, value_dim=8, rule=window)
    shape = ModelShape(linear_weights=0, attention=(wide, near), hidden_size=1, vocab_size=0, recurrent_flops=10)
    flops = shape.flops(Work(7, 100, 0, ((window, 30),)))
    assert flops.attention == 2 * 2 * 4 * (4 * 6 + 3 * 5) * 100 + 3 * 2 * 2 * 7 * 8 * 30
    assert flops.recurrent == 3 * 10 * 7
    assert shape.kv_elements == 2 * 11 + 3 * 16
    with pytest.raises(KeyError):
        shape.flops(Work(7, 100, 0))


def test_counts_add_up() -> None:
    window, chunk = Rule("window", 2), Rule("chunk", 3)
    together = total_work([Work(1, 2, 3, ((window, 1),)), Work(1, 2, 3, ((window, 2), (chunk, 4)))])
    assert (together.num_pairs, together.pairs_under(window), together.pairs_under(chunk)) == (4, 3, 4)
    assert total_work([Work(1, 2, 3), Work(10, 20, 30)]) == Work(11, 22, 33)
    assert total_work([]) == Work(0, 0, 0)
    assert Flops(linear=1, attention=20, head=300).total == 321
