"""Passes split over ranks give what one process gives: log-probs, everything else that a loss reads, every gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_hybrids import tiny_hybrid
from tiny_models import tiny_model
from two_processes import run_two_processes

import kvpref
from kvpref.errors import UnsupportedModelError
from kvpref.parallel.sequence import check_splits

WORKER = Path(__file__).with_name("sequence_worker.py")


@pytest.mark.slow
def test_two_ranks_match_one_process() -> None:
    run_two_processes(WORKER, "cases", "outputs", "memory", "wrapped", "refusals", 701)


@pytest.mark.slow
@pytest.mark.full
def test_four_ranks_match_one_process() -> None:
    run_two_processes(WORKER, "cases", "outputs", "memory", "wrapped", "refusals", num_ranks=4)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_prompt_of_8192_tokens(num_ranks: int) -> None:
    run_two_processes(WORKER, 8192, num_ranks=num_ranks)


def test_more_ranks_than_heads_are_refused() -> None:
    model = tiny_model("llama")  # 4 query heads, 2 key/value heads
    check_splits(model, 2)
    with pytest.raises(UnsupportedModelError, match=r"sequence_parallel 4 .*4 query heads and 2 key/value heads"):
        check_splits(model, 4)


def test_layers_with_a_state_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="carries a state from row to row"):
        check_splits(tiny_hybrid("Qwen3Next"), 2)


def test_models_without_passes_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="mode 'padded' only"):
        check_splits(tiny_model("llama", model_type="bloom"), 2)


def test_a_model_that_is_not_split_needs_no_sum() -> None:
    model = tiny_model("llama", torch.float64)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    kvpref.sum_sequence_gradients(model)
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
