"""`cuda_flash` against float64 references: blocks, trees, and a whole model."""

from __future__ import annotations

import cuda_attention
import oracle
import pytest
import torch
from sample_groups import five_levels, pairs
from tiny_models import tiny_model

import kvpref
from kvpref.ops.attention import calls, get_backend, select_backend
from kvpref.ops.attention.spreading import spread_keys_below

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAME = "cuda_flash"
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", cuda_attention.HEADS, ids=str)
@pytest.mark.parametrize("block_name", cuda_attention.BLOCKS)
def test_blocks_against_the_reference(block_name: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    cuda_attention.check_block(NAME, block_name, heads, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_without_queries_get_zero_gradients(dtype: torch.dtype) -> None:
    cuda_attention.check_keys_without_queries(NAME, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_have_an_infinite_lse(dtype: torch.dtype) -> None:
    cuda_attention.check_rows_without_keys(NAME, dtype)


@pytest.mark.parametrize("heads", cuda_attention.HEADS, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_trees_are_no_worse_than_naive_16_bit(depth: int, head_dim: int, heads: tuple[int, int]) -> None:
    cuda_attention.check_tree(NAME, depth, heads, head_dim, torch.bfloat16)


def test_launches_over_some_pairs_equal_one_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair by itself: rows are sliced, offsets are computed on the device."""
    block = cuda_attention.block_of((0, 130, 130, 400, 401), (0, 5, 9, 300, 440))
    query, dout = (cuda_attention.random(401, 8, 64, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    key, value = (cuda_attention.random(440, 2, 64, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    given, backend = (query, key, value, block, cuda_attention.PARAMS), get_backend(NAME)
    whole = calls.forward_block(backend, *given)
    grads = calls.backward_block(backend, dout, *given[:3], whole, *given[3:])
    monkeypatch.setattr(calls, "split_pairs", lambda offsets_key, limits: ((0, 1), (1, 3), (3, 4)))
    split = calls.forward_block(backend, *given)
    torch.testing.assert_close(split, whole, rtol=0, atol=0)
    for found, expected in zip(calls.backward_block(backend, dout, *given[:3], whole, *given[3:]), grads, strict=True):
        assert cuda_attention.relative(found, expected) <= torch.finfo(torch.bfloat16).eps  # dq adds up in any order


def test_copied_keys_have_the_gradients_of_the_keys() -> None:
    block = cuda_attention.block_of((0, 3000, 3000, 6000), (0, 200, 210, 300))
    query, dout = (cuda_attention.random(6000, 8, 64, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    key, value = (cuda_attention.random(300, 2, 64, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    given, backend = (query, key, value, block, cuda_attention.PARAMS), get_backend(NAME)
    whole = calls.forward_block(backend, *given)
    plain = calls.backward_block(backend, dout, *given[:3], whole, *given[3:])
    with spread_keys_below(201):
        spread = calls.backward_block(backend, dout, *given[:3], whole, *given[3:])
    assert spread[1].dtype == torch.float32, "the copies' gradients are added up in fp32"
    for found, expected in zip(spread, plain, strict=True):
        assert cuda_attention.relative(found, expected) <= 2 * torch.finfo(torch.bfloat16).eps


def test_auto_selects_it_for_16_bit_only() -> None:
    """Or FlashAttention-3, on a Hopper device that has it."""
    query = torch.empty(1, 1, 64, dtype=torch.bfloat16, device="cuda")
    is_hopper = torch.cuda.get_device_capability()[0] == 9
    has_newer = is_hopper and get_backend("flash_attn_3").unsupported_reason(query) is None
    assert select_backend("auto", query).name == ("flash_attn_3" if has_newer else "cuda_flash")
    assert select_backend("auto", torch.empty(1, 1, 64, device="cuda")).name == "efficient"
    with pytest.raises(ValueError, match=r"float16 or bfloat16.*these can: efficient, tiled, reference"):
        select_backend("cuda_flash", torch.empty(1, 1, 64, device="cuda"))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("mode", ["two_pass", "one_pass", "packed", "padded"])
@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_models_are_no_worse_than_naive_bf16(kind: str, mode: str, checkpointing: bool) -> None:
    dtype = torch.bfloat16 if kind == "weights" else torch.float32
    groups = five_levels() + pairs()
    model = tiny_model("mistral", dtype).cuda()  # head dim 16: the kernel needs a multiple of 8
    exact = oracle.naive(oracle.twin(model, torch.float64), groups)
    with torch.autocast("cuda", torch.bfloat16, enabled=kind == "autocast"):
        baseline = oracle.naive(oracle.twin(model), groups)
        if checkpointing:
            oracle.checkpoint_layers(model)
        batch = kvpref.collate(groups, min_shared_tokens=1, device="cuda")
        found = oracle.shared(kvpref.attach(model), batch, mode=mode)
    assert oracle.relative_error(found.token_logps, exact.token_logps) <= 2 * oracle.relative_error(
        baseline.token_logps, exact.token_logps
    )
    for name, grad in exact.grads.items():
        if grad.ndim > 1:
            allowed = 2 * oracle.relative_error(baseline.grads[name], grad)
            assert oracle.relative_error(found.grads[name], grad) <= allowed, name


def test_fp32_model_on_cuda() -> None:
    """`auto` on the GPU, fp32 with TF32 off: 6e-8 per operation, amplified by norms and softmax."""
    groups = five_levels()
    model = tiny_model("mistral", torch.float32).cuda()
    truth = oracle.naive(tiny_model("mistral", torch.float64), groups)
    truth = oracle.Result(truth.token_logps.cuda(), {name: grad.cuda() for name, grad in truth.grads.items()})
    batch = kvpref.collate(groups, min_shared_tokens=1, device="cuda")
    oracle.assert_same(oracle.shared(kvpref.attach(model), batch), truth, 1e-5)
