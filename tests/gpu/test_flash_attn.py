"""The FlashAttention packages against float64: blocks and trees. Skipped where a package is missing."""

from __future__ import annotations

import cuda_attention
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ["flash_attn", "flash_attn_3", "flash_attn_4"]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", cuda_attention.HEADS, ids=str)
@pytest.mark.parametrize("block_name", cuda_attention.BLOCKS)
def test_blocks_against_the_reference(block_name: str, heads: tuple[int, int], dtype: torch.dtype, name: str) -> None:
    cuda_attention.check_block(name, block_name, heads, dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_without_queries_get_zero_gradients(dtype: torch.dtype, name: str) -> None:
    cuda_attention.check_keys_without_queries(name, dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_have_an_infinite_lse(dtype: torch.dtype, name: str) -> None:
    cuda_attention.check_rows_without_keys(name, dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_trees_are_no_worse_than_naive(depth: int, head_dim: int, dtype: torch.dtype, name: str) -> None:
    cuda_attention.check_tree(name, depth, (8, 2), head_dim, dtype)
