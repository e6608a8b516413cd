"""Log-probs of chosen tokens from hidden states: linear, log-softmax and gather fused in tiles.

Shape legend: S scored tokens, K hidden size, V vocabulary size. The (S, V) logits never exist, forward or backward:
both passes work on tiles of at most `max_tile_bytes`, so peak memory does not depend on S x V.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from kvpref.ops.logprob.tiles import HeadParams, Tiles

__all__ = ["HeadParams", "TokenStatistics", "naive_token_logprobs", "token_logprobs", "token_statistics"]


class TokenStatistics(NamedTuple):
    """The results of one pass over the vocabulary for S tokens; float32, or float64 for float64 inputs.

    Attributes:
        logps: (S,) log-prob of each target, natural log.
        entropy: (S,) entropy of each distribution, in nats; None if not asked for.
        collision: (S,) log of the sum of squared probabilities, without gradient; None if not asked for.
        mean_logits: (S,) mean of the logits, without gradient; None if not asked for.
    """

    logps: torch.Tensor
    entropy: torch.Tensor | None
    collision: torch.Tensor | None
    mean_logits: torch.Tensor | None


def token_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    params: HeadParams | None = None,
    weight_grad: torch.Tensor | None = None,
) -> TokenStatistics:
    """Statistics of ``log_softmax(logits)``, without the (S, V) logits.

    ``linear = hidden @ weight.T + bias``, and `HeadParams` says how that becomes logits: scale, softcap, temperature.
    The backward pass computes the tiles again from the saved log-sum-exp (Wijmans et al. 2024, arXiv 2411.09009).
    Sums are kept in fp32 (fp64 for fp64 inputs); under autocast the matrix products run in autocast's dtype on CUDA.

    Args:
        hidden: (S, K), float.
        weight: (V, K), float.
        targets: (S,), int64, in [0, V).
        bias: (V,), float.
        params: Scale, softcap, temperature, which statistics to compute, and tile size.
        weight_grad: (V, K), the dtype of `weight`. If given, the backward pass adds the weight's gradient to it, tile
            by tile, and autograd gets none for the weight.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            "token_statistics takes hidden (S, K), weight (V, K) and targets (S,); "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    device = hidden.device.type
    gemm_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    tiles = Tiles(hidden, weight, params or HeadParams(), gemm_dtype)
    return TokenStatistics(*_TokenStatistics.apply(hidden, weight, bias, targets, tiles, weight_grad))


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    params: HeadParams | None = None,
    weight_grad: torch.Tensor | None = None,
) -> torch.Tensor:
    """The log-probs of `token_statistics` alone: (S,) float32, or float64 for float64 inputs."""
    return token_statistics(hidden, weight, targets, bias=bias, params=params, weight_grad=weight_grad).logps


def naive_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    params: HeadParams | None = None,
) -> torch.Tensor:
    """The definition and test oracle of `token_logprobs`; builds the full logits."""
    params = params or HeadParams()
    logits = torch.nn.functional.linear(hidden, weight, bias) * params.logit_scale
    if params.softcap is not None:
        logits = params.softcap * torch.tanh(logits / params.softcap)
    logits = logits / params.temperature
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


class _Moments:
    """Sums over the vocabulary for some rows of tokens, tile after tile."""

    def __init__(self, like: torch.Tensor, params: HeadParams) -> None:
        self.lse = torch.full_like(like, float("-inf"))
        self.mean_logit = torch.zeros_like(like) if params.entropy else None
        self.lse_of_doubles = torch.full_like(like, float("-inf")) if params.collision else None
        self.sum_of_logits = torch.zeros_like(like) if params.mean_logits else None

    def add(self, logits: torch.Tensor) -> None:
        """Take in one tile, (rows, columns), which is overwritten."""
        if self.sum_of_logits is not None:
            self.sum_of_logits += logits.sum(dim=1)
        # Kept finite if all columns are masked out; differences would be NaN.
        lowest = torch.finfo(logits.dtype).min
        largest = logits.amax(dim=1).clamp_(min=lowest)
        exps = logits.sub_(largest.unsqueeze(1)).exp_()
        total = exps.sum(dim=1)
        tile_lse = total.log() + largest
        lse = torch.logaddexp(self.lse, tile_lse)
        if self.mean_logit is not None:
            # xlogy: exp * log(exp), 0 for a column that is masked out. The total is at least 1, or all of them are.
            mean = torch.special.xlogy(exps, exps).sum(dim=1) / total.clamp(min=1) + largest
            finite = lse.clamp(min=lowest)
            self.mean_logit = self.mean_logit * (self.lse - finite).exp() + mean * (tile_lse - finite).exp()
        if self.lse_of_doubles is not None:
            doubles = exps.square_().sum(dim=1).log_() + 2 * largest
            self.lse_of_doubles = torch.logaddexp(self.lse_of_doubles, doubles)
        self.lse = lse

    def entropy(self) -> torch.Tensor | None:
        return None if self.mean_logit is None else self.lse - self.mean_logit

    def collision(self) -> torch.Tensor | None:
        return None if self.lse_of_doubles is None else self.lse_of_doubles - 2 * self.lse

    def mean_logits(self, vocab_size: int) -> torch.Tensor | None:
        return None if self.sum_of_logits is None else self.sum_of_logits / vocab_size


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        tiles: Tiles,
        weight_grad: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        # A target outside [0, V) lies in no tile: NaN, not a plausible number.
        target_logits = hidden.new_full((tiles.num_tokens,), float("nan"), dtype=tiles.sum_dtype)
        parts: list[_Moments] = []
        buffer = tiles.buffer(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in tiles.token_ranges():
                parts.append(_Moments(target_logits[rows], tiles.params))
                row_hidden = tiles.operand(hidden[rows])
                for columns in tiles.vocab_ranges():
                    tile_bias = None if bias is None else bias[columns]
                    logits = tiles.logits(row_hidden, tiles.operand(weight[columns]), tile_bias, buffer)
                    inside, index = tiles.locate(targets[rows], columns)
                    found = logits.gather(1, index.unsqueeze(1)).squeeze(1)
                    target_logits[rows] = torch.where(inside, found, target_logits[rows])
                    parts[-1].add(logits)
                    del logits  # or this tile would stay in memory beside the next
        lse = _joined([part.lse for part in parts], target_logits)
        entropy = _joined([part.entropy() for part in parts], target_logits) if tiles.params.entropy else None
        collision = _joined([part.collision() for part in parts], target_logits) if tiles.params.collision else None
        means = [part.mean_logits(tiles.vocab_size) for part in parts]
        mean_logits = _joined(means, target_logits) if tiles.params.mean_logits else None
        ctx.tiles, ctx.weight_grad = tiles, weight_grad
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(each for each in (collision, mean_logits) if each is not None))
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        return target_logits - lse, entropy, collision, mean_logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor | None, entropy_grad: torch.Tensor | None, *_: None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        tiles: Tiles = ctx.tiles
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        given: torch.Tensor | None = ctx.weight_grad
        grad = torch.zeros_like(lse) if grad is None else grad
        # Several row tiles add up in the weight's gradient, so it is then kept in the wider dtype.
        weight_dtype = weight.dtype if tiles.num_tokens <= tiles.tokens_per_tile else tiles.sum_dtype
        grad_hidden = torch.empty_like(hidden, dtype=tiles.sum_dtype) if need_hidden else None
        # Without tokens no tile would overwrite it.
        make_weight = torch.empty_like if tiles.num_tokens else torch.zeros_like
        grad_weight = given
        if given is None and need_weight:
            grad_weight = make_weight(weight, dtype=weight_dtype)
        grad_bias = torch.zeros_like(bias, dtype=tiles.sum_dtype) if need_bias else None
        buffer = tiles.buffer(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in tiles.token_ranges():
                row_grad = grad[rows].to(tiles.sum_dtype) * tiles.scale
                row_hidden = tiles.operand(hidden[rows])
                for columns in tiles.vocab_ranges():
                    tile_weight = tiles.operand(weight[columns])
                    tile_bias = None if bias is None else bias[columns]
                    logits = tiles.logits(row_hidden, tile_weight, tile_bias, buffer)
                    slope = tiles.cap_slope(logits)
                    probs = logits.sub_(lse[rows].unsqueeze(1)).exp_()
                    if entropy_grad is None:
                        dlogits = probs.mul_(row_grad.neg().unsqueeze(1))
                    else:
                        weights = entropy_grad[rows].to(tiles.sum_dtype) * tiles.scale
                        dlogits = _entropy_dlogits(probs, row_grad, weights, entropy[rows])
                    # d logp / d linear = scale * slope of the cap * (onehot - softmax)
                    inside, index = tiles.locate(targets[rows], columns)
                    dlogits.scatter_add_(1, index.unsqueeze(1), torch.where(inside, row_grad, 0.0).unsqueeze(1))
                    if slope is not None:
                        dlogits.mul_(slope)
                    if grad_bias is not None:
                        grad_bias[columns] += dlogits.sum(0)
                    operand = tiles.operand(dlogits)
                    del logits, slope, probs, dlogits  # one tile, of which at most a narrow copy is left
                    if grad_hidden is not None:
                        tiles.add_product(grad_hidden[rows], operand, tile_weight, first=columns.start == 0)
                    if grad_weight is not None:
                        first = given is None and rows.start == 0
                        tiles.add_product(grad_weight[columns], operand.T, row_hidden, first=first)
                    del operand
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None or given is not None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _joined(parts: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    """The values of all tokens, joined from each row of tiles."""
    return torch.cat(parts) if parts else torch.empty_like(like)  # type: ignore[arg-type]


def _entropy_dlogits(
    probs: torch.Tensor, row_grad: torch.Tensor, entropy_grad: torch.Tensor, entropy: torch.Tensor
) -> torch.Tensor:
    """Gradient with respect to a tile of logits if the entropy has a gradient; overwrites the probabilities.

    ``d entropy / d logits = -p (log p + entropy)``, and ``d logp / d logits`` without its onehot is ``-p``.
    """
    informations = torch.special.xlogy(probs, probs)
    probs.mul_((row_grad + entropy_grad * entropy).neg().unsqueeze(1))
    return probs.sub_(informations.mul_(entropy_grad.unsqueeze(1)))
