"""Tiles of logits: the grid that the fused head works on, and the arithmetic of one tile.

Shape legend: S scored tokens, K hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

_MAX_TOKENS_PER_TILE = 8192
_MIN_VOCAB_PER_TILE = 256
_TILE_BYTES = {"cpu": 16 * 2**20}  # fits the CPU's last-level cache
_DEFAULT_TILE_BYTES = 256 * 2**20

_tiled_for: ContextVar[str | None] = ContextVar("kvpref_tiled_for", default=None)


@contextmanager
def tiles_for(device_type: str) -> Iterator[None]:
    """Lay out tiles as on another type of device, for fake CPU tensors that stand in for it."""
    token = _tiled_for.set(device_type)
    try:
        yield
    finally:
        _tiled_for.reset(token)


@dataclass(frozen=True, kw_only=True)
class HeadParams:
    """How a model turns hidden states into logits beyond the linear layer, and which statistics are computed.

    ``logits = cap(logit_scale * linear) / temperature`` with ``cap(x) = softcap * tanh(x / softcap)``.

    Attributes:
        logit_scale: Factor on the linear layer's output.
        softcap: Bound of the logits' magnitude; None for none.
        temperature: Divides the logits at the end.
        max_tile_bytes: Bound on one tile of logits, in bytes (a tile has at least one token and 256 columns); None
            takes the fastest size measured for the device.
        entropy: Whether the entropy is computed.
        collision: Whether the sum of squared probabilities is computed.
        mean_logits: Whether the mean of the logits is computed.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    max_tile_bytes: int | None = None
    entropy: bool = False
    collision: bool = False
    mean_logits: bool = False

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive; got {self.softcap}")
        if self.max_tile_bytes is not None and self.max_tile_bytes < 1:
            raise ValueError(f"max_tile_bytes must be positive; got {self.max_tile_bytes}")


class Tiles:
    """The tile grid and its arithmetic, shared by forward and backward."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, params: HeadParams, gemm_dtype: torch.dtype) -> None:
        self.num_tokens, self.vocab_size = hidden.shape[0], weight.shape[0]
        # d logits / d linear, where nothing is capped.
        self.scale = params.logit_scale / params.temperature
        self.params = params
        self.sum_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        device = _tiled_for.get() or hidden.device.type
        # 16-bit products with fp32 results exist on CUDA only; elsewhere the operands are widened tile by tile.
        narrow = device == "cuda" and gemm_dtype in (torch.bfloat16, torch.float16)
        self.gemm_dtype = gemm_dtype if narrow else self.sum_dtype
        tile_bytes = params.max_tile_bytes or _TILE_BYTES.get(device, _DEFAULT_TILE_BYTES)
        most_tokens = min(_MAX_TOKENS_PER_TILE, tile_bytes // (self.sum_dtype.itemsize * _MIN_VOCAB_PER_TILE))
        self.tokens_per_tile = max(1, min(self.num_tokens, most_tokens))
        columns = tile_bytes // (self.sum_dtype.itemsize * self.tokens_per_tile)
        self.vocab_per_tile = min(self.vocab_size, max(_MIN_VOCAB_PER_TILE, columns))

    def token_ranges(self) -> Iterator[slice]:
        for start in range(0, self.num_tokens, self.tokens_per_tile):
            yield slice(start, min(start + self.tokens_per_tile, self.num_tokens))

    def vocab_ranges(self) -> Iterator[slice]:
        for start in range(0, self.vocab_size, self.vocab_per_tile):
            yield slice(start, min(start + self.vocab_per_tile, self.vocab_size))

    def operand(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the products' dtype; cast once, however many products read it."""
        return tensor.to(self.gemm_dtype)

    def product(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``left @ right`` of two operands, in the wider dtype; written to `out` if the operands have that dtype."""
        if self.gemm_dtype == self.sum_dtype:
            return torch.mm(left, right, out=out)
        return torch.mm(left, right, out_dtype=self.sum_dtype)

    def add_product(self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, first: bool) -> None:
        """``total += left @ right`` of two operands, in place; with `first`, `total` is overwritten."""
        if total.dtype == self.gemm_dtype:
            torch.addmm(total, left, right, beta=0 if first else 1, out=total)
        elif first:
            total.copy_(self.product(left, right))
        else:
            total += self.product(left, right)

    def logits(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, buffer: torch.Tensor | None
    ) -> torch.Tensor:
        """One tile, in `buffer` if possible: reused memory stays in the cache and costs no page faults.

        Args:
            hidden: (rows, K), an operand.
            weight: (columns, K), an operand.
            bias: (columns,), the bias of the same columns.
            buffer: Memory from the method `buffer`.
        """
        shape = (hidden.shape[0], weight.shape[0])
        tile = None if buffer is None else buffer[: shape[0] * shape[1]].view(shape)
        logits = self.product(hidden, weight.T, out=tile)
        if bias is not None:
            logits += bias
        if self.params.softcap is not None:
            cap = self.params.softcap
            return logits.mul_(self.params.logit_scale / cap).tanh_().mul_(cap / self.params.temperature)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def cap_slope(self, logits: torch.Tensor) -> torch.Tensor | None:
        """The derivative of the softcap at a tile of (capped) logits, ``1 - tanh^2``; None without a cap."""
        if self.params.softcap is None:
            return None
        tanh_per_logit = self.params.temperature / self.params.softcap
        return logits.square().mul_(-(tanh_per_logit**2)).add_(1.0)

    def buffer(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Memory for one tile of logits; None if products allocate their own."""
        if self.gemm_dtype != self.sum_dtype:
            return None
        return hidden.new_empty(self.tokens_per_tile * self.vocab_per_tile, dtype=self.sum_dtype)

    def locate(self, targets: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Which targets lie in these columns, and where (clamped where they do not)."""
        inside = (targets >= columns.start) & (targets < columns.stop)
        return inside, (targets - columns.start).clamp(0, columns.stop - columns.start - 1)
