"""`efficient` against float64: blocks and trees, in every dtype it takes."""

from __future__ import annotations

import cuda_attention
import pytest
import torch

from kvpref.ops.attention import get_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ["efficient"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_trees_are_no_worse_than_naive(depth: int, head_dim: int, dtype: torch.dtype, name: str) -> None:
    cuda_attention.check_tree(name, depth, (8, 2), head_dim, dtype)


def test_no_host_reads() -> None:
    """The log-sum-exp is laid out anew on the device alone: a synchronising call raises here."""
    cuda_attention.skip_unless_it_runs("efficient", torch.float32)
    block = cuda_attention.block_of((0, 3, 3, 10), (0, 5, 9, 200))
    query, key = (cuda_attention.random(rows, 4, 64, dtype=torch.float32) for rows in (10, 200))
    kernels = get_backend("efficient")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = kernels.forward(query, key, key, block, cuda_attention.PARAMS)
        kernels.backward(query, query, key, key, out, lse, block, cuda_attention.PARAMS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
