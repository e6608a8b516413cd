"""Merging partial attention by log-sum-exp."""

from __future__ import annotations

from functools import reduce

import pytest
import torch

from kvpref.ops.attention.merge import Partial, add_gradient, gradient_of_sink, merge_partials, merge_sink


def partials(num_parts: int, num_keys: int = 3) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Attention over disjoint key sets, and over their union."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 2, 4, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, num_parts * num_keys, 2, 4, generator=generator, dtype=torch.float64)

    def attend(span: slice) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.einsum("qhd,khd->hqk", query, keys[span])
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values[span]), scores.logsumexp(-1)

    parts = [attend(slice(i * num_keys, (i + 1) * num_keys)) for i in range(num_parts)]
    return parts, torch.stack([*attend(slice(None))][:1])[0]


def merge_all(parts: list[Partial], dtype: torch.dtype) -> Partial:
    """As they come, in the wider dtype but for the last."""
    *firsts, last = parts
    return merge_partials(reduce(lambda a, b: merge_partials(a, b, a[1].dtype), firsts), last, dtype)


def test_parts_make_the_whole() -> None:
    for num_parts in (2, 3, 5):
        parts, whole = partials(num_parts)
        out, lse = merge_all(parts, torch.float64)
        # A handful of float64 additions.
        torch.testing.assert_close(out, whole, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(lse, torch.stack([lse for _, lse in parts]).logsumexp(0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("mark", [float("-inf"), float("inf")])
def test_rows_that_saw_no_key_do_not_count(mark: float) -> None:
    """-inf, or +inf as FlashAttention-2 reports it."""
    parts, _ = partials(2)
    empty = (torch.zeros_like(parts[0][0]), torch.full_like(parts[0][1], mark))
    out, lse = merge_all([parts[1], empty, empty], torch.float64)
    assert torch.equal(out, parts[1][0])
    assert torch.equal(lse, parts[1][1])
    out, lse = merge_partials(empty, parts[1], torch.float64)
    assert torch.equal(out, parts[1][0])
    assert torch.equal(lse, parts[1][1])


def test_some_rows_without_keys() -> None:
    parts, _ = partials(2)
    out_part, lse_part = parts[1][0].clone(), parts[1][1].clone()
    out_part[1], lse_part[:, 1] = 0, float("-inf")
    out, lse = merge_all([parts[0], (out_part, lse_part)], torch.float64)
    full_out, full_lse = merge_all(parts, torch.float64)
    others = [0, 2, 3, 4]
    assert torch.equal(out[1], parts[0][0][1])
    assert torch.equal(lse[:, 1], parts[0][1][:, 1])
    assert torch.equal(out[others], full_out[others])
    assert torch.equal(lse[:, others], full_lse[:, others])


def test_very_different_sizes_stay_finite() -> None:
    parts, _ = partials(2)
    for shift in (-1e4, 1e4):
        out, lse = merge_all([parts[0], (parts[1][0], parts[1][1] + shift)], torch.float64)
        winner = parts[1] if shift > 0 else parts[0]
        assert torch.equal(out, winner[0])
        assert lse.isfinite().all()


def test_16_bit_parts_are_merged_in_fp32() -> None:
    parts, _ = partials(3)
    narrow = [(out.bfloat16(), lse.float()) for out, lse in parts]
    out, lse = merge_all(narrow, torch.float32)
    assert out.dtype == lse.dtype == torch.float32
    exact, _ = merge_all([(out.double(), lse.double()) for out, lse in narrow], torch.float64)
    # fp32 arithmetic on the same bf16 numbers.
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)


def add_all(terms: list[torch.Tensor]) -> torch.Tensor:
    total, *others = (term.clone() for term in terms)
    for number, term in enumerate(others, start=1):
        total = add_gradient(total, term, is_last=number == len(others))
    return total


def test_gradients_are_rounded_once() -> None:
    """Sums of 2 and of 64 16-bit terms equal the exact sum rounded at the end; adding in bf16 would stall."""
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 64):
        terms = [1 + torch.rand(5, 2, 4, generator=generator).bfloat16() for _ in range(count)]
        exact = torch.stack([term.double() for term in terms]).sum(0)
        assert torch.equal(add_all(terms).bfloat16(), exact.bfloat16())
    wide = [torch.rand(3, generator=generator, dtype=torch.float64) for _ in range(3)]
    assert torch.equal(add_all(wide), wide[0] + wide[1] + wide[2])


def test_a_sink_is_one_more_logit() -> None:
    """As attention over one more key whose value is zero; a row without keys gives all its weight to the sink."""
    torch.manual_seed(0)
    scores, values = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    sink = torch.tensor([0.3, -2.0], dtype=torch.bfloat16, requires_grad=True)
    out, lse = torch.einsum("htk,khd->thd", scores.softmax(-1), values), scores.logsumexp(-1)
    out[4], lse[:, 4] = 0.0, float("inf")  # as FlashAttention-2 reports it
    found, total = merge_sink((out, lse), sink.detach(), torch.float64)
    wide = sink.double()
    with_sink = torch.cat([scores, wide[:, None, None].expand(-1, 5, 1)], dim=-1)
    expected = torch.einsum("htk,khd->thd", with_sink.softmax(-1)[..., :3], values)
    torch.testing.assert_close(found[:4], expected[:4], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(total[:, :4], with_sink.logsumexp(-1)[:, :4], rtol=1e-13, atol=1e-13)
    assert found[4].count_nonzero() == 0
    assert torch.equal(total[:, 4], wide.detach())
    dout = torch.randn(5, 2, 4, dtype=torch.float64)
    (true_grad,) = torch.autograd.grad((expected[:4] * dout[:4]).sum(), [wide])
    grad = gradient_of_sink(dout, found, total, sink.detach())
    torch.testing.assert_close(grad, true_grad.to(torch.bfloat16), rtol=0, atol=0)
