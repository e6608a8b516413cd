"""What only a GPU can show: no synchronisation, determinism, bytes held, compiled layers, the fused merge."""

from __future__ import annotations

import os
from collections.abc import Iterator

import oracle
import pytest
import torch
from sample_groups import five_levels, pairs, tokens
from tiny_models import tiny_model

import kvpref
from kvpref.ops.attention import merge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it PyTorch refuses products while it must repeat


@pytest.fixture
def batch() -> kvpref.Batch:
    made = kvpref.collate(five_levels() + pairs(), min_shared_tokens=1, modes=("two_pass", "one_pass", "packed"))
    return made.to("cuda")


def make_model() -> torch.nn.Module:
    return kvpref.attach(tiny_model("mistral", torch.bfloat16).cuda())  # head dim 16: the kernel needs a multiple of 8


def gradients(model: torch.nn.Module, batch: kvpref.Batch, mode: str = "two_pass") -> list[torch.Tensor]:
    model.zero_grad()
    logps = kvpref.response_logps(model, batch, mode=mode).token_logps
    logps.sum().backward()
    return [logps.detach(), *oracle.grads_of(model).values()]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["two_pass", "one_pass", "packed"])
def test_a_step_never_waits_for_the_device(batch: kvpref.Batch, mode: str, no_synchronisation: None) -> None:
    model = make_model()
    gradients(model, batch, mode)  # kernels load and Triton compiles on first use
    torch.cuda.set_sync_debug_mode("error")
    gradients(model, batch, mode)


def long_groups() -> list[kvpref.Group]:
    """Prompts and responses longer than a kernel's block of keys, which is at most 128 rows."""
    system, groups = tokens(150, 1), []
    for seed in (10, 20):
        prompt = system + tokens(200, seed)
        lengths = (300, 170, 140)
        groups.append(
            kvpref.Group([kvpref.Sequence.from_prompt_and_response(prompt, tokens(n, seed + n)) for n in lengths])
        )
    return groups


@pytest.mark.parametrize("mode", ["two_pass", "one_pass", "packed"])
def test_deterministic_algorithms_give_the_same_bits(mode: str) -> None:
    """Merge and sums over ancestor depths included; an operator that cannot repeat itself raises."""
    batch = kvpref.collate(long_groups(), min_shared_tokens=1, modes=(mode,)).to("cuda")
    model = kvpref.attach(tiny_model("mistral", torch.bfloat16, max_position_embeddings=1024).cuda())
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients(model, batch, mode) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(first, again) for first, again in zip(runs[0], run, strict=True))


def test_prefix_bytes_are_those_of_the_unique_tokens(batch: kvpref.Batch) -> None:
    model = make_model()
    config = model.config
    cache = kvpref.encode_prefix(model, batch)
    num_tokens = batch.plan("two_pass").passes[0].input_ids.numel()
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    expected = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * num_tokens * 2
    tensors = [tensor for layer in cache.layers for slab in layer.slabs for tensor in slab]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    assert cache.num_bytes == sum(storage.nbytes() for storage in storages.values()) == expected


def test_compiled_layers(batch: kvpref.Batch) -> None:
    """Inductor on the real kernels; it may fuse and so round differently: bf16's own error, measured by float64."""
    exact = oracle.naive(tiny_model("mistral", torch.float64).cuda(), five_levels() + pairs()).token_logps
    model = make_model()
    plain = kvpref.response_logps(model, batch).token_logps
    kvpref.compile_layers(model)
    compiled = gradients(model, batch)[0]
    allowed = 2 * oracle.relative_error(plain.detach(), exact) + torch.finfo(torch.bfloat16).eps
    assert oracle.relative_error(compiled, exact) <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 80])
def test_fused_merge(head_dim: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    parts = [
        (torch.randn(1000, 6, head_dim, generator=generator).to(dtype), 5 * torch.randn(6, 1000, generator=generator))
        for _ in range(2)
    ]
    expected, expected_lse = merge.merge_partials(*parts, dtype)
    found, lse = merge.merge_partials(*((out.cuda(), lse.cuda()) for out, lse in parts), dtype)
    # fp32 arithmetic, then at most one unit in the last place where a tie rounds the other way.
    tolerance = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-6, atol=1e-6)
