"""What kernels hold while they run: seen on fake tensors, which no kernel touches.

A dispatch mode puts, in place of kvpref's attention operators, the code of the backend that the target device would
run. What remains hidden, buffers inside PyTorch's own kernels, is allocated beside them by formulas. Those for the CPU
are what its allocator reports; those for CUDA were read from PyTorch's sources and not compared with a GPU.

Shape legend: T queries (B pairs or rows of M queries), N keys, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kvpref.ops.attention.backends import cpu_flash, efficient, flash_kernels
from kvpref.ops.attention.backends.cuda_flash import CudaFlash
from kvpref.ops.attention.backends.efficient import Efficient
from kvpref.ops.attention.backends.interface import Backend, Needs
from kvpref.ops.attention.backends.tiled import Tiled
from kvpref.ops.attention.block import AttentionParams, VarlenBlock
from kvpref.ops.attention.blockwise import Merge, backward_blocks, forward_blocks, unflatten_blocks
from kvpref.ops.attention.merge import Partial, merge_partials
from kvpref.ops.attention.ops import needs_of
from kvpref.ops.logprob.tiles import tiles_for

_ATEN, _KVPREF = torch.ops.aten, torch.ops.kvpref

Choose = Callable[[torch.Tensor, Needs], Backend]


@contextmanager
def running_on(device_type: str, after_operator: Callable[[str], object]) -> Iterator[None]:
    """Let fake tensors on the CPU stand in for tensors on another type of device.

    Args:
        device_type: ``cuda`` or ``cpu``.
        after_operator: Called with the name of every operator that has run, while its arguments are held.
    """
    with tiles_for(device_type), _TargetKernels(device_type, after_operator):
        yield


class _TargetKernels(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and PyTorch's guard against it costs as much as all else

    def __init__(self, device_type: str, after_operator: Callable[[str], object]) -> None:
        super().__init__()
        choose, merge = _BACKENDS[device_type]
        self._cascades: dict[Any, Callable[..., Any]] = {
            _KVPREF.cascade_forward.default: partial(_cascade_forward, choose, merge),
            _KVPREF.cascade_backward.default: partial(_cascade_backward, choose),
        }
        self._hidden_bytes = _HIDDEN_BYTES[device_type]
        self._after_operator = after_operator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # asked for more often than all else
        cascade = self._cascades.get(func)
        if cascade is not None:
            with self:  # the backend's own operators
                return cascade(*args, **(kwargs or {}))
        hidden = self._hidden_bytes.get(func)
        buffer = None if hidden is None else torch.empty(hidden(*args), dtype=torch.uint8)
        result = _SHAPES.get(func, func)(*args, **(kwargs or {}))
        self._after_operator(func.name())
        del buffer
        return result


def _efficient_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: object, **settings: object
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and no gradient of a bias; in fp32 the kernel adds up in place."""
    return (*(torch.empty(item.shape, dtype=item.dtype) for item in (q, k, v)), torch.empty(0, dtype=q.dtype))


def _grouped_mm(left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor, *others: object) -> torch.Tensor:
    """Rows of experts one after another, (T, K) x (E, K, N); or both of them along T, (K, T) x (T, N)."""
    size = (left.shape[0], right.shape[-1])
    return torch.empty(size if right.ndim == 3 else (offs.shape[0], *size), dtype=left.dtype)


_SHAPES: dict[Any, Callable[..., Any]] = {
    _ATEN._efficient_attention_backward.default: _efficient_backward,
    _ATEN._grouped_mm.default: _grouped_mm,
}
"""In place of PyTorch's own rules for fake tensors: that for the first lacks an argument in PyTorch 2.13, that for the
second refuses fp32, which runs."""


def _cascade_forward(  # noqa: PLR0913 - takes an operator's arguments
    choose: Choose,
    merge: Merge,
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    sink: torch.Tensor | None,
    cu_seqlens: Sequence[torch.Tensor],
    host_offsets: Sequence[torch.Tensor],
    kinds: Sequence[int],
    scale: float,
    softcap: float,
    backend: str,
) -> Partial:
    """What `kvpref::cascade_forward` does, with a backend that its fake tensors would not be given."""
    blocks = _blocks(cu_seqlens, host_offsets, kinds)
    kernels = choose(query, needs_of(values, softcap))
    params = AttentionParams(scale=scale, softcap=softcap or None)
    return forward_blocks(kernels, params, blocks, query, keys, values, sink, merge)


def _cascade_backward(  # noqa: PLR0913 - takes an operator's arguments
    choose: Choose,
    dout: torch.Tensor,
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: Sequence[torch.Tensor],
    host_offsets: Sequence[torch.Tensor],
    kinds: Sequence[int],
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """What `kvpref::cascade_backward` does, likewise."""
    blocks = _blocks(cu_seqlens, host_offsets, kinds)
    params = AttentionParams(scale=scale, softcap=softcap or None)
    return backward_blocks(
        choose(query, needs_of(values, softcap)), params, blocks, dout, query, keys, values, (out, lse)
    )


def _blocks(
    cu_seqlens: Sequence[torch.Tensor], host_offsets: Sequence[torch.Tensor], kinds: Sequence[int]
) -> list[VarlenBlock]:
    """Their offsets are real; modes that make fake tensors of them must not see them read."""
    with _disable_current_modes():
        return unflatten_blocks(cu_seqlens, host_offsets, kinds)


class _CpuFlash(cpu_flash.CpuFlash):
    """Its index tensors are kept between calls; they must be real, whoever asks first."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, *args: Any) -> Partial:
        with _disable_current_modes():
            cpu_flash._calls(block.pairs, block.shape)
        return super().forward(q, k, v, block, *args)


def _cpu_backend(query: torch.Tensor, needs: Needs) -> Backend:
    return Tiled() if needs.softcap else _CpuFlash()


def _cuda_backend(query: torch.Tensor, needs: Needs) -> Backend:
    """What `auto` chooses for a CUDA tensor like this one; on a device of compute capability 8.0 or later."""
    if needs.softcap:
        return Tiled()
    head_dim, is_16_bit = needs.head_dim(query), query.dtype in (torch.bfloat16, torch.float16)
    if is_16_bit and head_dim <= 256 and head_dim % 8 == 0:
        return CudaFlash()
    return Efficient() if head_dim % (16 // query.dtype.itemsize) == 0 else Tiled()


def _merge_in_place(first: Partial, second: Partial, dtype: torch.dtype) -> Partial:
    """What the fused merge on CUDA allocates: it works in the first result's memory where the dtype allows."""
    out, lse = first
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype), lse


_BACKENDS: dict[str, tuple[Choose, Merge]] = {
    "cpu": (_cpu_backend, merge_partials),
    "cuda": (_cuda_backend, _merge_in_place),
}


def _cpu_split(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int]:
    """Rows of queries and of keys that the CPU's flash kernels work on at a time; (B, H, M, D) and (B, G, N, D)."""
    num_queries = query.shape[2]
    rows = 256 if num_queries >= 768 else 64 if num_queries >= 192 else 32
    return min(rows, num_queries), min(512, key.shape[2])


def _cpu_forward_bytes(query: torch.Tensor, key: torch.Tensor, *_: Any) -> int:
    """Scores, two statistics and the output of a split, per thread."""
    rows, keys = _cpu_split(query, key)
    return torch.get_num_threads() * query.itemsize * rows * (keys + 2 + query.shape[3])


def _cpu_backward_bytes(dout: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any) -> int:
    """Scores and their gradient per thread, one statistic, and one more tensor of the query's size."""
    rows, keys = _cpu_split(query, key)
    return query.nbytes + query.itemsize * rows * (2 * keys * torch.get_num_threads() + 1)


def _flash_backward_bytes(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *_: Any,
) -> int:
    """FlashAttention-2 (`mha_varlen_bwd`): query (T, H, D), key (N, G, D).

    An fp32 accumulator of dq and a row sum per query, every pair padded by 128 rows; with GQA dk and dv per query head.
    """
    num_rows = query.shape[0] + 128 * (len(cu_seqlens_q) - 1)
    num_heads, head_dim = query.shape[1:]
    expanded = 0 if key.shape[1] == num_heads else 2 * key.shape[0] * num_heads * head_dim * key.itemsize
    return num_rows * num_heads * (flash_kernels.rounded_head_dim(head_dim) + 1) * 4 + expanded


def _sdpa_backward_bytes(dout: torch.Tensor, query: torch.Tensor, *_: Any) -> int:
    """`scaled_dot_product_attention`, (B, H, M, D): a row sum per query, in 16 bits an fp32 accumulator of dq."""
    num_rows, num_heads, length, head_dim = query.shape
    columns = 1 if query.dtype == torch.float32 else flash_kernels.rounded_head_dim(head_dim) + 1
    return num_rows * num_heads * -(-length // 128) * 128 * columns * 4


def _efficient_backward_bytes(dout: torch.Tensor, query: torch.Tensor, *others: Any) -> int:
    """PyTorch's memory-efficient attention: query (1, T, H, D)."""
    cu_seqlens_q, _, longest_query = others[4:7]  # behind key, value, bias and out
    return efficient.workspace_bytes(len(cu_seqlens_q) - 1, query.shape[2], longest_query, query.shape[3])


_SDPA = _ATEN._scaled_dot_product_flash_attention_for_cpu.default
"""What `scaled_dot_product_attention` calls for the fake tensors; its results have the sizes of CUDA's kernels."""
_SDPA_BACKWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default

_HIDDEN_BYTES: dict[str, dict[Any, Callable[..., int]]] = {
    "cpu": {_SDPA: _cpu_forward_bytes, _SDPA_BACKWARD: _cpu_backward_bytes},
    "cuda": {
        _ATEN._flash_attention_backward.default: _flash_backward_bytes,
        _ATEN._efficient_attention_backward.default: _efficient_backward_bytes,
        _SDPA_BACKWARD: _sdpa_backward_bytes,
    },
}
"""Operator -> bytes of the buffers that it takes and frees inside, from its arguments."""
