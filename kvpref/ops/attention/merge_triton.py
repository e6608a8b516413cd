"""The merge by log-sum-exp as one Triton kernel: both partial results are read once and the merged one written once.

Shape legend: T rows, H heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS_PER_PROGRAM = 32

Partial = tuple[torch.Tensor, torch.Tensor]


@triton.jit
def _merge_kernel(  # noqa: PLR0913 - a kernel takes pointers and sizes one by one
    first_ptr,
    first_lse_ptr,
    second_ptr,
    second_lse_ptr,
    out_ptr,
    lse_ptr,
    num_rows,
    NUM_HEADS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    # Head sizes are constants: loads are wide only if the compiler sees that rows are aligned, and about an unknown
    # number it knows no more than whether 16 divides it.
    head = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    # (T, H, D) offsets may pass 2^31 for long rows.
    lse_offsets = head.to(tl.int64) * num_rows + rows
    first_lse = tl.load(first_lse_ptr + lse_offsets, mask=row_mask, other=0.0)
    second_lse = tl.load(second_lse_ptr + lse_offsets, mask=row_mask, other=0.0)
    # A row without keys: -inf, or +inf as FlashAttention-2 reports it.
    first_lse = tl.where(first_lse == float("inf"), float("-inf"), first_lse)
    second_lse = tl.where(second_lse == float("inf"), float("-inf"), second_lse)
    largest = tl.maximum(first_lse, second_lse)
    largest = tl.where(largest == float("-inf"), 0.0, largest)  # neither saw a key: weights of zero, not inf - inf
    first_weight = tl.exp(first_lse - largest)
    second_weight = tl.exp(second_lse - largest)
    total = first_weight + second_weight
    tl.store(lse_ptr + lse_offsets, largest + tl.log(total), mask=row_mask)

    columns = tl.arange(0, COLUMNS)
    offsets = (rows.to(tl.int64)[:, None] * NUM_HEADS + head) * HEAD_DIM + columns[None, :]
    mask = row_mask[:, None] & (columns < HEAD_DIM)[None, :]
    first = tl.load(first_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    total = tl.where(total == 0.0, 1.0, total)
    merged = first * (first_weight / total)[:, None] + second * (second_weight / total)[:, None]
    tl.store(out_ptr + offsets, merged.to(out_ptr.dtype.element_ty), mask=mask)


def merge_two(first: Partial, second: Partial, dtype: torch.dtype) -> Partial:
    """Merge two partial results; arithmetic in fp32.

    Args:
        first: out (T, H, D), float, and lse (H, T), float32; a row that saw no key has lse = -inf or +inf.
        second: The same over other keys.
        dtype: The dtype of the merged out.

    Returns:
        out (T, H, D) in `dtype` and lse (H, T) float32. The storage of `first` is reused where the dtype allows.
    """
    (first_out, first_lse), (second_out, second_lse) = (
        (out.contiguous(), lse.contiguous()) for out, lse in (first, second)
    )
    out = first_out if first_out.dtype == dtype else torch.empty_like(first_out, dtype=dtype)
    num_rows, num_heads, head_dim = out.shape
    grid = (triton.cdiv(num_rows, _ROWS_PER_PROGRAM), num_heads)
    # Triton starts kernels on the current device, wherever their tensors are.
    with torch.cuda.device_of(out):
        _merge_kernel[grid](
            first_out,
            first_lse,
            second_out,
            second_lse,
            out,
            first_lse,
            num_rows,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            ROWS=_ROWS_PER_PROGRAM,
            COLUMNS=triton.next_power_of_2(head_dim),
        )
    return out, first_lse
