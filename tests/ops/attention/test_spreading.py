"""Copies of short keys: the same gradients from more thread blocks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvpref.ops.attention import AttentionParams, VarlenBlock, get_backend, spreading
from kvpref.ops.attention.calls import backward_block
from kvpref.ops.attention.spreading import plan_spread, spread_keys_below
from kvpref.prefix.blocks import VarlenLayout

PARAMS = AttentionParams(scale=0.37)
CPU = torch.device("cpu")


def block_of(q: tuple[int, ...], k: tuple[int, ...]) -> VarlenBlock:
    return VarlenBlock.from_layout(VarlenLayout(cu_seqlens_q=q, cu_seqlens_k=k, shape="rectangle"))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Thirty multiprocessors and tiny tiles, so that small blocks are worth spreading."""
    monkeypatch.setattr(spreading, "_num_processors", lambda device: 30)
    monkeypatch.setattr(spreading, "_MIN_QUERIES", 3)
    plan_spread.cache_clear()
    yield
    plan_spread.cache_clear()


BLOCKS = {
    "one prompt": block_of((0, 20), (0, 5)),
    "several prompts": block_of((0, 20, 21, 21, 40), (0, 5, 7, 9, 12)),
}


@pytest.mark.usefixtures("small_device")
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_those_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, reference = BLOCKS[name], get_backend("reference")
    q, dout, out = (random(block.num_queries, 4, 8).roll(shift, 0) for shift in range(3))
    k, v = (random(block.num_keys, 2, 8).roll(shift, 0) for shift in range(2))
    lse = 2 + random(4, block.num_queries)
    given = (dout, q, k, v, (out, lse), block, PARAMS)
    truth = reference.backward(dout, q, k, v, out, lse, block, PARAMS)
    launched: list[VarlenBlock] = []
    backward = type(reference).backward

    def record(self: object, *args: object) -> object:
        launched.append(args[6])  # type: ignore[arg-type]
        return backward(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(type(reference), "backward", record)
    with spread_keys_below(6):
        found = backward_block(reference, *given)
    assert launched[-1].num_keys > block.num_keys
    assert launched[-1].num_queries == block.num_queries
    for grad, true_grad in zip(found, truth, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=0, atol=1e-12)
    backward_block(reference, *given)
    assert launched[-1] is block, "off unless asked for"
    with spread_keys_below(5):
        backward_block(reference, *given)
    assert launched[-1] is block, "the longest key range is not shorter than 5"


def test_there_are_enough_thread_blocks_and_queries() -> None:
    """One prompt of 200 tokens, 32 heads, 64 responses of 100 tokens, 132 multiprocessors with two blocks each."""
    spread = plan_spread(block_of((0, 6400), (0, 200)).offsets_key, 32, 264, CPU)
    assert spread is not None
    lengths = spread.block.cu_seqlens_q.diff()
    assert len(lengths) == 5  # 5 copies x 2 tiles x 32 heads >= 264
    assert lengths.sum() == 6400
    assert lengths.min() >= 256
    assert spread.block.cu_seqlens_k.diff().tolist() == [200] * 5
    assert plan_spread(block_of((0, 300), (0, 200)).offsets_key, 32, 264, CPU) is None, "too few queries to share"
    assert plan_spread(block_of((0, 6400), (0, 2000)).offsets_key, 32, 264, CPU) is None, "keys enough"


def test_the_backward_pass_does_not_wait_for_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made inside a layer: what goes to the device goes from page-locked memory."""
    moved: list[torch.Tensor] = []

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        moved.append(tensor)
        return tensor

    monkeypatch.setattr(spreading, "to_device", to_device)
    plan_spread.cache_clear()
    spread = plan_spread(block_of((0, 6400), (0, 200)).offsets_key, 32, 264, CPU)
    plan_spread.cache_clear()
    assert spread is not None
    storages = {tensor.untyped_storage().data_ptr() for tensor in moved}
    held = (spread.block.cu_seqlens_q, spread.block.cu_seqlens_k, spread.sources, spread.copies)
    assert {tensor.untyped_storage().data_ptr() for tensor in held} == storages


def test_copies_are_added_up_in_fp32() -> None:
    """Of 64 copies with gradient 1 + 2^-8, bf16 would lose the small part."""
    grads = torch.full((64, 1, 1), 1 + 2**-7, dtype=torch.bfloat16)
    total = spreading._sum_of_copies(grads, torch.arange(64)[None])
    assert total.dtype == torch.float32
    assert total.item() == 64 * (1 + 2**-7)
