"""Two gloo processes give what one process gives with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from preference_runs import make_args, make_groups, make_model, reference_free_loss, split_unevenly
from two_processes import run_two_processes

import kvpref
from kvpref.plan.step import join_batches

WORKER = Path(__file__).with_name("distributed_worker.py")
# float64 throughout: only the order of sums differs.
TOLERANCE = 1e-10


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm().clamp(min=1e-8)
        assert error < TOLERANCE, f"{name}: relative error {error:.2e}"


@pytest.mark.slow
def test_bounded_ddp_matches_one_process(tmp_path: Path) -> None:
    shares = split_unevenly(make_groups())
    num_chunks = [
        len(join_batches([kvpref.collate(share)], max_tokens_per_chunk=10).chunks.micro_batches[0].chunks)
        for share in shares
    ]
    assert num_chunks[0] < num_chunks[1], "ranks must run different numbers of chunks"
    run_two_processes(WORKER, "bounded", tmp_path)
    model = kvpref.attach(make_model())
    kvpref.forward_backward(model, kvpref.collate(make_groups()), reference_free_loss)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    once, again, accumulated = torch.load(tmp_path / "grads.pt")
    assert_close(once, expected)
    assert_close(again, expected)
    assert_close(accumulated, {name: 2 * grad for name, grad in expected.items()})


@pytest.mark.slow
def test_groups_over_the_budget_run_in_chunks_on_the_rank_that_has_them(tmp_path: Path) -> None:
    groups = make_groups()
    sizes = [kvpref.collate([group]).num_unique_tokens for group in groups]
    assert min(sizes) <= 34 < max(sizes)
    run_two_processes(WORKER, "trainer", tmp_path)
    args = make_args(str(tmp_path / "one"), max_tokens_per_micro_batch=None)
    trainer = kvpref.PreferenceTrainer(make_model(), args, train_dataset=groups)
    trainer.train()
    expected = {name: weight.detach() for name, weight in trainer.model.named_parameters()}
    assert_close(torch.load(tmp_path / "weights.pt"), expected)
