"""Log-probs over TRL's tree rows, against each sample alone, and against TRL's own forward and attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs the extra kvpref[trl]")

import agent_rows
import oracle
import trl_tree_rows
from tiny_experts import tiny_experts
from tiny_hybrids import tiny_hybrid
from tiny_models import tiny_model
from torch import nn
from trl.experimental.async_grpo import packing
from trl.trainer.utils import add_fused_lm_head

import kvpref
from kvpref import InputError
from kvpref.integrations.trl import tree_row_logps
from kvpref.integrations.trl.tree_forward import add_tree_row_head

TEMPERATURE = 0.7
# float64: two orders of summation.
TOLERANCE = 1e-10
# TRL's head computes logits in fp32 whatever the model; sums in another order.
TRL_TOLERANCE = 2e-5

REFUSED_BY_TRL = {"Lfm2": tiny_hybrid, "Qwen3Next": tiny_hybrid, "gpt_oss": tiny_experts}
"""Convolution and recurrent layers, and sinks."""

CASES = [
    ("llama", "calls_that_nest", "two_pass", {}),
    ("llama", "attempts_that_branch", "two_pass", {}),
    ("llama", "attempts_that_branch", "one_pass", {}),
    ("llama", "some_without_responses", "two_pass", {}),
    ("mistral", "calls_that_nest", "two_pass", {"sliding_window": 7}),
]
OTHER_CASES = [(name, "attempts_that_branch", "two_pass", {}) for name in REFUSED_BY_TRL]


def build(variant: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return REFUSED_BY_TRL.get(variant, tiny_model)(variant, dtype, **changes)


def terms_alone(model: nn.Module, rows: list[agent_rows.Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of the row's loss terms by the unattached model, one sample at a time."""
    found = []
    for ids, flags in rows:
        tokens = torch.tensor(ids)
        logps = (model(input_ids=tokens[None], use_cache=False).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
        trained = torch.tensor(flags[1:], dtype=torch.bool)
        own = logps.gather(1, tokens[1:, None]).squeeze(1)
        found.append(torch.stack([own, -(logps.exp() * logps).sum(1)])[:, trained])
    logps, entropy = torch.cat(found, dim=1)
    return logps, entropy


def grads_of(model: nn.Module, terms: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a sum in which each term has a weight of its own, as each sample has an advantage."""
    weights = torch.randn(2, len(terms[0]), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ((weights[0] * terms[0]).sum() + (weights[1] * terms[1]).sum()).backward()
    return oracle.grads_of(model)


@pytest.mark.parametrize(("variant", "kind", "mode", "changes"), [*CASES, *OTHER_CASES])
def test_loss_terms_are_those_of_each_sample_alone(variant: str, kind: str, mode: str, changes: dict[str, Any]) -> None:
    rows = agent_rows.KINDS[kind]()
    row = trl_tree_rows.packed(rows)
    naive, model = (build(variant, torch.float64, **changes) for _ in range(2))
    kvpref.attach(model)
    with oracle.true_float64():
        truth = terms_alone(naive, rows)
        found = tree_row_logps(model, row, temperature=TEMPERATURE, mode=mode)
        assert found.entropy is not None
        assert found.logps.shape == row["input_ids"].shape
        assert not found.logps[row["shift_labels"] == -100].any()
        terms = found.logps[row["token_index"]], found.entropy[row["token_index"]]
        for ours, theirs in zip(terms, truth, strict=True):
            assert oracle.relative_error(ours.detach(), theirs.detach()) <= TOLERANCE
        grads, expected = grads_of(model, terms), grads_of(naive, truth)
    for name, theirs in expected.items():
        assert oracle.relative_error(grads[name], theirs) <= TOLERANCE, name


def trl_inputs(row: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As `AsyncGRPOTrainer.compute_loss` hands a row to the model."""
    lengths = dict(zip(("tree_max_seqlen_q", "tree_max_seqlen_k"), row["tree_max_seqlens"].tolist(), strict=True))
    tokens = {name: row[name].unsqueeze(0) for name in ("input_ids", "position_ids", "shift_labels")}
    tree = {name: row[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    return {**tokens, **tree, **lengths, "fused_lm_head": True}


@pytest.mark.parametrize(("variant", "kind", "mode", "changes"), CASES)
def test_the_forward_gives_what_trls_gives(variant: str, kind: str, mode: str, changes: dict[str, Any]) -> None:
    inputs = trl_inputs(trl_tree_rows.packed(agent_rows.KINDS[kind]()))
    theirs, ours = tiny_model(variant, **changes), tiny_model(variant, **changes)
    packing.register_tree_attention()
    theirs.set_attn_implementation(packing.TREE_ATTENTION)
    add_fused_lm_head(theirs, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    ours.set_attn_implementation(packing.TREE_ATTENTION)  # as the trainer loads it
    add_tree_row_head(ours, temperature=TEMPERATURE, outputs=("log_probs", "entropy"), mode=mode)
    with trl_tree_rows.stand_in_kernel():
        truth = theirs(**inputs)
    found = ours(**inputs)
    assert torch.equal(found.label_mask, truth.label_mask)
    weights = torch.randn(truth.log_probs.shape, generator=torch.Generator().manual_seed(3))
    for output in (truth, found):
        (weights * (output.log_probs + 0.3 * output.entropy)).sum().backward()
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), rtol=TRL_TOLERANCE, atol=TRL_TOLERANCE)
    grads = oracle.grads_of(theirs)
    for name, grad in oracle.grads_of(ours).items():
        assert oracle.relative_error(grad, grads[name]) < 1e-4, name


def test_what_the_forward_does_not_read_is_refused() -> None:
    inputs = trl_inputs(trl_tree_rows.packed(agent_rows.alone()))
    model = tiny_model("llama")
    add_tree_row_head(model, outputs=("log_probs", "entropy"), mode="two_pass")
    with pytest.raises(InputError, match="returns them; tree_kv_index missing"):
        model(**{name: value for name, value in inputs.items() if name != "tree_kv_index"})
    with pytest.raises(InputError, match="cannot pass output_router_logits"):
        model(**inputs, output_router_logits=True)
    with pytest.raises(InputError, match="does not compute is_top1 of tree rows"):
        add_tree_row_head(model, outputs=("is_top1",), mode="two_pass")
