"""The loops in docs/agent_loops.md run, and train."""

from __future__ import annotations

import agent_rows
import pytest
import torch
from markdown_pages import DOCS, code_blocks
from tiny_models import tiny_model

import kvpref

PAGE = DOCS / "agent_loops.md"
LOOP, BOUNDED, TREE_ROW = code_blocks(PAGE, "python")


def test_the_loop_has_twenty_lines_and_learns() -> None:
    """Attempts with a positive advantage become likelier, and the others less likely."""
    assert len([line for line in LOOP.splitlines() if line]) == 20
    rows = agent_rows.padded(agent_rows.attempts_that_branch(), "both")
    rows["advantages"] = torch.tensor([1.0, -1.0, 1.0, 0.5, -1.0])
    model, before = tiny_model("llama"), kvpref.attach(tiny_model("llama"))
    exec(LOOP, {"model": model, "rollouts": [rows] * 2})
    with torch.no_grad():
        change = (kvpref.tree_logps(model, rows).logps - kvpref.tree_logps(before, rows).logps).sum(1)
    gains = change * rows["advantages"]
    assert gains.sum() > 0
    assert (gains[1:] > 0).all()  # the first's own first turn is that of two bad attempts


def test_the_bounded_step_has_the_gradient_of_the_whole() -> None:
    rows = agent_rows.padded(agent_rows.attempts_that_branch(), "both")
    rows["advantages"] = torch.tensor([1.0, -1.0, 1.0, 0.5, -1.0])
    model, whole = kvpref.attach(tiny_model("llama")), kvpref.attach(tiny_model("llama"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    exec(BOUNDED.replace("4096", "16"), {"kvpref": kvpref, "model": model, "rows": rows, "optimizer": optimizer})
    found = kvpref.tree_logps(whole, rows).logps
    (-(found * rows["advantages"].unsqueeze(1)).sum() / rows["response_mask"].sum()).backward()
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        # float32: sums in another order.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_the_row_has_the_gradient_of_its_samples() -> None:
    pytest.importorskip("trl", reason="needs the extra kvpref[trl]")
    import trl_tree_rows

    found = agent_rows.attempts_that_branch()
    samples, rows = trl_tree_rows.samples(found), agent_rows.padded(found)
    model, alone = tiny_model("llama"), kvpref.attach(tiny_model("llama"))
    exec(TREE_ROW, {"kvpref": kvpref, "torch": torch, "model": model, "samples": samples})
    old, mask = torch.zeros(rows["input_ids"].shape), rows["response_mask"].bool()
    for row, sample in zip(old, samples, strict=True):
        row[: len(sample["old_log_probs"])] = torch.from_numpy(sample["old_log_probs"])
    ratio = (kvpref.tree_logps(alone, rows).logps - old).exp()
    advantages = torch.tensor([[sample["advantage"]] for sample in samples])
    (-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)[mask].mean()).backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        # float32: sums in another order.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
