"""Models with recurrent and convolution layers on a GPU, with whatever kernels are installed for them."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from hybrid_groups import hybrid_groups
from tiny_hybrids import tiny_hybrid

import kvpref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("options", [{}, {"schedule": "bounded", "max_tokens_per_chunk": 5, "prefix_cache": "cpu"}])
@pytest.mark.parametrize("name", ["FalconMamba", "Lfm2", "Mamba2", "MiniMax", "Qwen3_5Text"])
def test_gradients(name: str, options: dict[str, Any]) -> None:
    """fp32 as on the CPU."""
    model = tiny_hybrid(name).cuda()
    truth = oracle.naive(oracle.twin(model), hybrid_groups())
    kvpref.attach(model)
    batch = kvpref.collate(hybrid_groups(), min_shared_tokens=1, device="cuda")
    found = oracle.scheduled(model, batch, **options)
    oracle.assert_same(found, truth, 1e-3)
    again = oracle.scheduled(model, batch, **options)
    assert torch.equal(found.token_logps, again.token_logps)
