"""The contract of each backend on a single block, and the choice of a backend by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvpref.ops.attention import AttentionParams, VarlenBlock, available_backends, get_backend, select_backend
from kvpref.ops.attention.backends.cuda_flash import CudaFlash
from kvpref.prefix.blocks import VarlenLayout

CPU_BACKENDS = ("reference", "tiled", "cpu_flash")
PARAMS = AttentionParams(scale=0.5)


def block_of(q: tuple[int, ...], k: tuple[int, ...], causal: bool = False) -> VarlenBlock:
    return VarlenBlock.from_layout(
        VarlenLayout(cu_seqlens_q=q, cu_seqlens_k=k, shape="causal" if causal else "rectangle")
    )


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_lse_is_the_natural_log_and_empty_pairs_give_minus_infinity(backend: str) -> None:
    """Rows 3 and 4 belong to a pair without keys, keys 2 to 4 to a pair without queries."""
    q, k, v = random(6, 4, 8), random(6, 2, 8), random(6, 2, 8)
    block = block_of((0, 3, 3, 5, 6), (0, 2, 5, 5, 6))
    out, lse = get_backend(backend).forward(q, k, v, block, PARAMS)
    assert out.shape == q.shape
    assert lse.shape == (4, 6)
    assert out[3:5].count_nonzero() == 0
    assert (lse[:, 3:5] == float("-inf")).all()
    heads = k.repeat_interleave(2, dim=1)
    expected = torch.einsum("qhd,khd->hqk", q[:3], heads[:2]).mul(0.5).logsumexp(-1)
    torch.testing.assert_close(lse[:, :3], expected, rtol=1e-13, atol=1e-13)  # float64 sums of ten terms
    dq, dk, dv = get_backend(backend).backward(random(6, 4, 8), q, k, v, out, lse, block, PARAMS)
    assert dq[3:5].count_nonzero() == 0
    assert dk[2:5].count_nonzero() == 0
    assert dv[2:5].count_nonzero() == 0
    assert all(tensor.isfinite().all() for tensor in (dq, dk, dv))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_causal_blocks_see_themselves_and_what_is_before(backend: str) -> None:
    q = random(4, 1, 8)
    value = torch.eye(4, 8, dtype=torch.float64).unsqueeze(1)  # outputs are the attention weights themselves
    out, _ = get_backend(backend).forward(q, random(4, 1, 8), value, block_of((0, 1, 4), (0, 1, 4), True), PARAMS)
    expected = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(out[:, 0, :4] > 0, expected)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_16_bit_inputs_give_fp32_results(backend: str) -> None:
    q, k, v = (random(3, 2, 8, dtype=torch.bfloat16) for _ in range(3))
    block = block_of((0, 3), (0, 3), True)
    out, lse = get_backend(backend).forward(q, k, v, block, PARAMS)
    assert out.dtype == lse.dtype == torch.float32
    grads = get_backend(backend).backward(q, q, k, v, out, lse, block, PARAMS)
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_unknown_names_are_answered_with_the_known() -> None:
    for choose in (get_backend, lambda name: select_backend(name, random(1, 1, 8))):
        with pytest.raises(ValueError, match=r"'flash_attn_9'; choose from: auto, cpu_flash, cuda_flash, efficient, "):
            choose("flash_attn_9")


def test_a_backend_that_cannot_serve_names_those_that_can() -> None:
    with pytest.raises(
        ValueError, match=r"'cuda_flash' cannot run here: .*'cpu'; these can: cpu_flash, tiled, reference"
    ):
        select_backend("cuda_flash", random(1, 1, 8))
    meta = torch.empty(1, 1, 8, device="meta")
    with pytest.raises(ValueError, match=r"'cpu_flash' cannot run here: .*'meta'; these can: tiled, reference"):
        select_backend("cpu_flash", meta)


def test_auto_takes_the_fast_one() -> None:
    assert select_backend("auto", random(1, 1, 8)).name == "cpu_flash"
    assert select_backend("auto", torch.empty(1, 1, 8, device="meta")).name == "tiled"
    assert available_backends(random(1, 1, 8)) == ["cpu_flash", "tiled", "reference"]


def test_integer_queries_are_refused() -> None:
    for name in CPU_BACKENDS:
        with pytest.raises(ValueError, match="float dtype"):
            select_backend(name, torch.zeros(1, 1, 8, dtype=torch.int64))


class FakeQuery:
    """A query on a device that this machine may not have."""

    def __init__(self, dtype: torch.dtype, head_dim: int) -> None:
        self.device, self.dtype, self.shape = torch.device("cuda", 0), dtype, torch.Size((5, 4, head_dim))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "reason"),
    [
        (torch.bfloat16, 64, (8, 0), None),
        (torch.float16, 256, (9, 0), None),
        (torch.float32, 64, (8, 0), "float16 or bfloat16"),
        (torch.bfloat16, 60, (8, 0), "multiple of 8"),
        (torch.bfloat16, 264, (8, 0), "at most 256"),
        (torch.bfloat16, 64, (7, 5), "8.0"),
    ],
)
def test_cuda_flash_says_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int, capability: tuple[int, int], reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = CudaFlash().unsupported_reason(FakeQuery(dtype, head_dim))  # type: ignore[arg-type]
    assert (found is None) if reason is None else (found is not None and reason in found)


class FakeAten:
    """Stands in for the two CUDA kernels and keeps what it was called with."""

    def __init__(self, lse: torch.Tensor) -> None:
        self.lse, self.calls = lse, []

    def _flash_attention_forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        self.calls.append((args, kwargs))
        return (torch.zeros_like(args[0]), self.lse, *(torch.empty(0) for _ in range(3)))

    def _flash_attention_backward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        self.calls.append((args, kwargs))
        return tuple(torch.zeros_like(tensor) for tensor in args[1:4])


def arguments_by_name(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Match a call with the real operator's schema, so that a shifted argument shows."""
    names = [argument.name for argument in operator.default._schema.arguments if not argument.kwarg_only]
    assert len(args) == len(names)
    keyword_only = {argument.name for argument in operator.default._schema.arguments if argument.kwarg_only}
    assert set(kwargs) <= keyword_only
    return {**dict(zip(names, args, strict=True)), **kwargs}


@pytest.mark.parametrize("causal", [False, True])
def test_cuda_flash_calls_the_kernels_with_the_block(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    forward, backward = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
    lse = torch.tensor([[0.5, float("inf"), -1.0, 2.0, 1.0]])
    fake = FakeAten(lse)
    monkeypatch.setattr(torch.ops, "aten", fake)
    block = block_of((0, 2, 2, 5), (0, 2, 2, 5), causal) if causal else block_of((0, 2, 2, 5), (0, 3, 7, 8))
    q, k, v = (torch.ones(n, 1, 8, dtype=torch.bfloat16) for n in (5, 8, 8))
    out, merged = CudaFlash().forward(q, k, v, block, PARAMS)
    assert merged is lse, "the merge takes +inf for a row without keys, so nothing is copied"
    assert lse.isinf().sum() == 1, "the kernel's own tensor is left alone"
    call = arguments_by_name(forward, *fake.calls[0])
    assert call["query"] is q
    assert call["key"] is k
    assert call["value"] is v
    assert call["cum_seq_q"] is block.cu_seqlens_q
    assert call["cum_seq_k"] is block.cu_seqlens_k
    assert (call["max_q"], call["max_k"]) == (3, 3 if causal else 4)
    assert (call["dropout_p"], call["is_causal"], call["return_debug_mask"]) == (0.0, causal, False)
    assert call["scale"] == 0.5

    dout = torch.ones(8, 1, 5, dtype=torch.bfloat16).permute(2, 1, 0)
    merged_lse = torch.zeros(5, 1).T
    grads = CudaFlash().backward(dout, q, k, v, out, merged_lse, block, PARAMS)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
    call = arguments_by_name(backward, *fake.calls[1])
    assert torch.equal(call["grad_out"], dout)
    assert call["grad_out"].is_contiguous()
    assert call["query"] is q
    assert call["key"] is k
    assert call["value"] is v
    assert call["out"] is out
    assert torch.equal(call["logsumexp"], merged_lse)
    assert call["logsumexp"].is_contiguous()
    assert call["cum_seq_q"] is block.cu_seqlens_q
    assert call["cum_seq_k"] is block.cu_seqlens_k
    assert (call["max_q"], call["max_k"]) == (3, 3 if causal else 4)
    assert (call["dropout_p"], call["is_causal"], call["scale"]) == (0.0, causal, 0.5)
    assert (call["rng_state"].dtype, call["rng_state"].shape) == (torch.uint64, (2,))
