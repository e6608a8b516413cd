"""Deterministic kernels repeat every bit, where sequences are longer than what a kernel works on at a time."""

from __future__ import annotations

import os

import cuda_attention
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it PyTorch refuses products while it must repeat

SIXTEEN_BIT = ["cuda_flash", "efficient", "flash_attn", "flash_attn_3", "flash_attn_4", "xformers"]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", SIXTEEN_BIT)
def test_kernels_in_bf16(name: str, head_dim: int) -> None:
    cuda_attention.check_determinism(name, torch.bfloat16, head_dim)


@pytest.mark.parametrize("name", ["efficient", "reference"])
def test_kernels_in_fp32(name: str) -> None:
    cuda_attention.check_determinism(name, torch.float32)
