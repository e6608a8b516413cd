"""What a loss requests from the engine besides the log-probs of scored tokens."""

from __future__ import annotations

from dataclasses import dataclass

from kvpref.errors import InputError

READS = ("tokens", "ends")
"""What a loss reads: the log-probs of scored tokens, or the reward at the end of each sequence."""

SPANS = ("none", "images", "prompts")
"""Which runs of tokens a model lets see one another in both directions: none, those of each image, or whole prompts."""


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
        """The union of two losses' requests.

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
