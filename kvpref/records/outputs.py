"""The engine's outputs for the sequences of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch

WITHOUT_GRAD = ("collision", "mean_logits")
"""Fields of `ResponseLogps` that no gradient flows through."""


class ResponseLogps(NamedTuple):
    """Log-probs of the scored tokens of every sequence, in the caller's order of sequences.

    A NamedTuple, so that distributed wrappers, which look for tensors in a forward's output, find them. S is the number
    of scored tokens over all sequences; fields not requested by `kvpref.HeadOptions` are None.

    Attributes:
        token_logps: (S,) float32 (float64 for a float64 model), natural log, sequence after sequence.
        cu_seqlens: (num_sequences + 1,) int64; sequence i owns token_logps[cu_seqlens[i]:cu_seqlens[i + 1]].
        group_index: (num_sequences,) int64, the group of each sequence.
        entropy: (S,) in nats, the dtype of `token_logps`.
        collision: (S,) log of the sum of squared probabilities, without gradient.
        mean_logits: (S,) without gradient.
        hidden: (S, hidden_size) in the model's dtype.
        values: (S,) the dtype of `token_logps`.
        logits: (S, len(logit_ids)) the dtype of `token_logps`.
        weights: (S,) the weight of each token, at least 0, the dtype of `token_logps`; None for 1 each
            (`Sequence.weights`).
    """

    token_logps: torch.Tensor
    cu_seqlens: torch.Tensor
    group_index: torch.Tensor
    entropy: torch.Tensor | None = None
    collision: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    values: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def lengths(self) -> torch.Tensor:
        """Number of scored tokens per sequence, (num_sequences,) int64."""
        return self.cu_seqlens.diff()

    def total_weights(self) -> torch.Tensor:
        """Total weight of each sequence's tokens, (num_sequences,): `lengths`, or the sums of their weights."""
        return self.lengths() if self.weights is None else self._sums(self.weights)

    def sum(self) -> torch.Tensor:
        """Log-prob of each whole response, (num_sequences,), the dtype of `token_logps`; tokens are weighted."""
        return self.sum_of(self.token_logps)

    def mean(self) -> torch.Tensor:
        """Log-prob per scored token of each response, (num_sequences,); 0 where the total weight is 0."""
        return self.mean_of(self.token_logps)

    def sum_of(self, values: torch.Tensor) -> torch.Tensor:
        """(S,) values of tokens, summed by weight over each sequence, (num_sequences,)."""
        return self._sums(self.weighted(values))

    def mean_of(self, values: torch.Tensor) -> torch.Tensor:
        """(S,) values of tokens, averaged by weight over each sequence, (num_sequences,); 0 if all weights are 0."""
        return self.sum_of(values) / or_one(self.total_weights())

    def weighted(self, values: torch.Tensor) -> torch.Tensor:
        """(S,) values of tokens times the tokens' weights, (S,)."""
        return values if self.weights is None else values * self.weights

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """(num_sequences,) values of sequences, repeated for each scored token, (S,)."""
        return torch.repeat_interleave(values, self.lengths(), output_size=self.token_logps.shape[0])

    def _sums(self, values: torch.Tensor) -> torch.Tensor:
        return torch.segment_reduce(values, "sum", offsets=self.cu_seqlens, initial=0)


def or_one(totals: torch.Tensor) -> torch.Tensor:
    """Token counts, or sums of weights, as divisors: 1 in place of 0."""
    return totals.where(totals > 0, 1)


class ResponseRewards(NamedTuple):
    """Rewards of every sequence, in the caller's order of sequences.

    Attributes:
        rewards: (num_sequences,) float32 (float64 for a float64 model).
        group_index: (num_sequences,) int64, the group of each sequence.
    """

    rewards: torch.Tensor
    group_index: torch.Tensor


Responses = ResponseLogps | ResponseRewards
"""The policy's outputs as passed to a loss, depending on what it reads."""
