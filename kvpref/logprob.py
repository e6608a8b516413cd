"""Log-probs of chosen tokens from hidden states: linear, log-softmax and gather fused in tiles.

Shape legend: S scored tokens, K hidden size, V vocabulary size. The (S, V) logits never exist, forward or backward:
both passes work on tiles of at most `max_tile_bytes`, so peak memory does not depend on S x V.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

_MAX_TOKENS_PER_TILE = 8192
_MIN_VOCAB_PER_TILE = 256
_TILE_BYTES = {"cpu": 16 * 2**20}  # tiles that stay in the CPU's last-level cache
_DEFAULT_TILE_BYTES = 256 * 2**20

_tiled_for: ContextVar[str | None] = ContextVar("kvpref_tiled_for", default=None)


@contextmanager
def tiles_for(device_type: str) -> Iterator[None]:
    """Lay out tiles as on another type of device: for fake tensors on the CPU that stand in for it."""
    token = _tiled_for.set(device_type)
    try:
        yield
    finally:
        _tiled_for.reset(token)


@dataclass(frozen=True, kw_only=True)
class HeadParams:
    """How a model turns hidden states into logits beyond the linear layer.

    Attributes:
        logit_scale: Factor on the logits.
        max_tile_bytes: Bound on one tile of logits, in bytes (a tile has at least one token and 256 columns); None
            takes what was fastest for the device.
    """

    logit_scale: float = 1.0
    max_tile_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.max_tile_bytes is not None and self.max_tile_bytes < 1:
            raise ValueError(f"max_tile_bytes must be positive; got {self.max_tile_bytes}")


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    params: HeadParams | None = None,
    weight_grad: torch.Tensor | None = None,
) -> torch.Tensor:
    """``log_softmax(logit_scale * (hidden @ weight.T + bias))[i, targets[i]]``, without the (S, V) logits.

    The backward pass computes the tiles again from the saved log-sum-exp (Wijmans et al. 2024, arXiv 2411.09009).
    Sums are kept in fp32 (fp64 for fp64 inputs); under autocast the matrix products run in autocast's dtype on CUDA.

    Args:
        hidden: (S, K), float.
        weight: (V, K), float.
        targets: (S,), int64, in [0, V).
        bias: (V,), float.
        params: Scale and tile size.
        weight_grad: (V, K), the dtype of `weight`. If given, the backward pass adds the weight's gradient to it, tile
            by tile, and autograd gets none for the weight.

    Returns:
        (S,) float32, or float64 for float64 inputs.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            "token_logprobs takes hidden (S, K), weight (V, K) and targets (S,); "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    device = hidden.device.type
    gemm_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    tiles = _Tiles(hidden, weight, params or HeadParams(), gemm_dtype)
    logps: torch.Tensor = _TokenLogprobs.apply(hidden, weight, bias, targets, tiles, weight_grad)
    return logps


def naive_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    params: HeadParams | None = None,
) -> torch.Tensor:
    """The definition of `token_logprobs` in two lines; builds the full logits. Its oracle."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * (params or HeadParams()).logit_scale
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


class _Tiles:
    """The tile grid and its arithmetic, shared by forward and backward."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, params: HeadParams, gemm_dtype: torch.dtype) -> None:
        self.num_tokens, self.vocab_size, self.scale = hidden.shape[0], weight.shape[0], params.logit_scale
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

    def product(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``left @ right`` in the wider dtype; in `out` where the products are computed in that dtype too."""
        left, right = left.to(self.gemm_dtype), right.to(self.gemm_dtype)
        if self.gemm_dtype == self.sum_dtype:
            return torch.mm(left, right, out=out)
        return torch.mm(left, right, out_dtype=self.sum_dtype)

    def add_product(self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, first: bool) -> None:
        """``total += left @ right`` in place; with `first`, what `total` held is overwritten."""
        if total.dtype == self.gemm_dtype:
            left, right = left.to(self.gemm_dtype), right.to(self.gemm_dtype)
            torch.addmm(total, left, right, beta=0 if first else 1, out=total)
        elif first:
            total.copy_(self.product(left, right))
        else:
            total += self.product(left, right)

    def logits(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        columns: slice,
        buffer: torch.Tensor | None,
    ) -> torch.Tensor:
        """One tile, in `buffer` if it can be: memory that is used again stays in the cache and costs no page faults."""
        shape = (hidden.shape[0], columns.stop - columns.start)
        tile = None if buffer is None else buffer[: shape[0] * shape[1]].view(shape)
        logits = self.product(hidden, weight[columns].T, out=tile)
        if bias is not None:
            logits += bias[columns]
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def buffer(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Memory for one tile of logits; None where products come in memory of their own."""
        if self.gemm_dtype != self.sum_dtype:
            return None
        return hidden.new_empty(self.tokens_per_tile * self.vocab_per_tile, dtype=self.sum_dtype)

    def locate(self, targets: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Which targets lie in these columns, and where (clamped where they do not)."""
        inside = (targets >= columns.start) & (targets < columns.stop)
        return inside, (targets - columns.start).clamp(0, columns.stop - columns.start - 1)


def _logsumexp_in_place(logits: torch.Tensor) -> torch.Tensor:
    """(tokens, columns) -> (tokens,); overwrites the logits."""
    # Finite where all columns are masked out, or the difference would be NaN.
    largest = logits.amax(dim=1).clamp_(min=torch.finfo(logits.dtype).min)
    return logits.sub_(largest.unsqueeze(1)).exp_().sum(dim=1).log_().add_(largest)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        tiles: _Tiles,
        weight_grad: torch.Tensor | None,
    ) -> torch.Tensor:
        lse = hidden.new_full((tiles.num_tokens,), float("-inf"), dtype=tiles.sum_dtype)
        # A target outside [0, V) lies in no tile: NaN, not a plausible number.
        target_logits = torch.full_like(lse, float("nan"))
        buffer = tiles.buffer(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in tiles.token_ranges():
                for columns in tiles.vocab_ranges():
                    logits = tiles.logits(hidden[rows], weight, bias, columns, buffer)
                    inside, index = tiles.locate(targets[rows], columns)
                    found = logits.gather(1, index.unsqueeze(1)).squeeze(1)
                    target_logits[rows] = torch.where(inside, found, target_logits[rows])
                    lse[rows] = torch.logaddexp(lse[rows], _logsumexp_in_place(logits))
        ctx.tiles, ctx.weight_grad = tiles, weight_grad
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        return target_logits - lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        tiles: _Tiles = ctx.tiles
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        given: torch.Tensor | None = ctx.weight_grad
        # Several row tiles add up in the weight's gradient, so it is then kept in the wider dtype.
        weight_dtype = weight.dtype if tiles.num_tokens <= tiles.tokens_per_tile else tiles.sum_dtype
        grad_hidden = torch.empty_like(hidden, dtype=tiles.sum_dtype) if need_hidden else None
        # Without a token no tile would overwrite it.
        make_weight = torch.empty_like if tiles.num_tokens else torch.zeros_like
        grad_weight = given
        if given is None and need_weight:
            grad_weight = make_weight(weight, dtype=weight_dtype)
        grad_bias = torch.zeros_like(bias, dtype=tiles.sum_dtype) if need_bias else None
        buffer = tiles.buffer(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in tiles.token_ranges():
                row_grad = grad[rows].to(tiles.sum_dtype) * tiles.scale
                for columns in tiles.vocab_ranges():
                    # d logp / d logits = scale * (onehot - softmax)
                    dlogits = tiles.logits(hidden[rows], weight, bias, columns, buffer)
                    dlogits.sub_(lse[rows].unsqueeze(1)).exp_().mul_(row_grad.neg().unsqueeze(1))
                    inside, index = tiles.locate(targets[rows], columns)
                    dlogits.scatter_add_(1, index.unsqueeze(1), torch.where(inside, row_grad, 0.0).unsqueeze(1))
                    if grad_hidden is not None:
                        tiles.add_product(grad_hidden[rows], dlogits, weight[columns], first=columns.start == 0)
                    if grad_weight is not None:
                        first = given is None and rows.start == 0
                        tiles.add_product(grad_weight[columns], dlogits.T, hidden[rows], first=first)
                    if grad_bias is not None:
                        grad_bias[columns] += dlogits.sum(0)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None or given is not None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )
