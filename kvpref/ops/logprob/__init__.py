"""Log-probs of chosen tokens from hidden states, without the logits."""

from kvpref.ops.logprob.statistics import (
    HeadParams,
    TokenStatistics,
    naive_token_logprobs,
    token_logprobs,
    token_statistics,
)

__all__ = ["HeadParams", "TokenStatistics", "naive_token_logprobs", "token_logprobs", "token_statistics"]
