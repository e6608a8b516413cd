"""What the engine computes for the sequences of a batch, and what a loss may ask for besides log-probs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvpref.errors import InputError

READS = ("tokens", "ends")
"""What a loss reads: the log-probs of scored tokens, or the reward at the end of each sequence."""

WITHOUT_GRAD = ("collision", "mean_logits")
"""Fields of `ResponseLogps` that no gradient flows through."""


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """What the LM head computes at scored tokens, in one pass over the vocabulary."""

    temperature: float = 1.0
    """Logits are divided by it before the softmax."""

    entropy: bool = False
    """Entropy of the distribution that each scored token is drawn from, with gradient."""

    collision: bool = False
    """Log of the sum of its squared probabilities, without gradient."""

    mean_logits: bool = False
    """Mean of its logits over the vocabulary, without gradient."""

    hidden: bool = False
    """The final hidden state that predicts each scored token, with gradient."""

    values: bool = False
    """The value head's output there, with gradient; see `kvpref.add_value_head`."""

    logit_ids: tuple[int, ...] = ()
    """Tokens whose logits are wanted at every scored token, with gradient."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature must be positive; got {self.temperature}")

    def joined(self, other: HeadOptions) -> HeadOptions:
        """What two losses ask for together.

        Raises:
            InputError: If they want different temperatures or the logits of different tokens.
        """
        if self.temperature != other.temperature:
            raise InputError(f"losses at temperatures {self.temperature} and {other.temperature} cannot be mixed")
        if self.logit_ids and other.logit_ids and self.logit_ids != other.logit_ids:
            raise InputError(f"losses that read the logits of {self.logit_ids} and {other.logit_ids} cannot be mixed")
        return HeadOptions(
            temperature=self.temperature,
            entropy=self.entropy or other.entropy,
            collision=self.collision or other.collision,
            mean_logits=self.mean_logits or other.mean_logits,
            hidden=self.hidden or other.hidden,
            values=self.values or other.values,
            logit_ids=self.logit_ids or other.logit_ids,
        )


class ResponseLogps(NamedTuple):
    """Log-probs of the scored tokens of every sequence, in the order in which the caller gave the sequences.

    A NamedTuple, so that distributed wrappers, which look for tensors in a forward's output, find them. S is the number
    of scored tokens over all sequences; what was not asked for (`HeadOptions`) is None.

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

    def lengths(self) -> torch.Tensor:
        """Number of scored tokens per sequence, (num_sequences,) int64."""
        return self.cu_seqlens.diff()

    def sum(self) -> torch.Tensor:
        """Log-prob of each whole response, (num_sequences,), the dtype of `token_logps`."""
        return self.sum_of(self.token_logps)

    def mean(self) -> torch.Tensor:
        """Log-prob per scored token of each response, (num_sequences,); 0 where a sequence has none."""
        return self.mean_of(self.token_logps)

    def sum_of(self, values: torch.Tensor) -> torch.Tensor:
        """(S,) values of tokens summed over each sequence, (num_sequences,)."""
        return torch.segment_reduce(values, "sum", offsets=self.cu_seqlens, initial=0)

    def mean_of(self, values: torch.Tensor) -> torch.Tensor:
        """(S,) values of tokens averaged over each sequence, (num_sequences,); 0 where a sequence has no token."""
        return self.sum_of(values) / self.lengths().clamp(min=1)

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """(num_sequences,) values of sequences, repeated for each scored token, (S,)."""
        return torch.repeat_interleave(values, self.lengths(), output_size=self.token_logps.shape[0])


class ResponseRewards(NamedTuple):
    """Rewards of every sequence, in the order in which the caller gave the sequences.

    Attributes:
        rewards: (num_sequences,) float32 (float64 for a float64 model).
        group_index: (num_sequences,) int64, the group of each sequence.
    """

    rewards: torch.Tensor
    group_index: torch.Tensor
