"""The published policy gradients, by what they clip, average over and compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvpref.errors import InputError
from kvpref.losses.checks import check_not_negative, check_positive
from kvpref.losses.policy_gradient.base import PolicyGradient
from kvpref.losses.scores import TURN_SCORES
from kvpref.records.groups import Group
from kvpref.records.outputs import ResponseLogps


@dataclass(frozen=True, kw_only=True)
class ClippedPolicyGradient(PolicyGradient):
    """Base of the methods that clip as PPO does: a token's loss is ``-min(w A, clip(w, 1 - e_low, 1 + e_high) A)``."""

    epsilon: float = 0.2
    """e_low, and e_high unless given."""

    epsilon_high: float | None = None
    """e_high; None is `epsilon`."""

    delta: float | None = None
    """Upper bound of w where A < 0, above 1 + e_high, against single tokens with a huge ratio (Prime Intellect 2025,
    arXiv 2505.07291); None leaves it unbounded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self.name, epsilon=self.epsilon, epsilon_high=self._epsilon_high)
        if self.delta is not None and not self.delta > 1 + self._epsilon_high:
            raise InputError(
                f"{self.name}: delta must be above 1 + epsilon_high ({1 + self._epsilon_high:g}); got {self.delta}"
            )

    @property
    def _epsilon_high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def token_losses(self, logps: torch.Tensor, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        clipped = ratios.clamp(1 - self.epsilon, 1 + self._epsilon_high)
        bounded = ratios if self.delta is None else ratios.clamp(max=self.delta)
        return -torch.min(bounded * advantages, clipped * advantages)

    def clip_metrics(self, ratios: torch.Tensor, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
        low = ((ratios < 1 - self.epsilon) & (advantages < 0)).to(ratios.dtype)
        high = ((ratios > 1 + self._epsilon_high) & (advantages > 0)).to(ratios.dtype)
        return {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}


@dataclass(frozen=True, kw_only=True)
class GRPO(ClippedPolicyGradient):
    """GRPO: the mean over responses of ``1/T sum_t [-min(w_t A, clip(w_t, 1 - e, 1 + e) A) + beta D_t]``.

    ``A = (s - mean(s)) / (std(s) + 1e-4)`` over the scores s of the group. Equation 3 of Shao et al. 2024
    (DeepSeekMath, arXiv 2402.03300).
    """

    name = "grpo"


@dataclass(frozen=True, kw_only=True)
class DrGRPO(ClippedPolicyGradient):
    """Dr. GRPO: GRPO with ``A = s - mean(s)`` and ``1/L sum_t``, where L is the same for all responses.

    Liu et al. 2025 (arXiv 2503.20783), section 3.2: neither long responses nor easy and hard prompts count differently.
    """

    scale_rewards: str = "none"
    """Advantages are divided by nothing, or by the ``group``'s standard deviation."""

    max_completion_length: int = 256
    """L, the token limit that the samples were drawn with."""

    name = "dr_grpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, max_completion_length=self.max_completion_length)

    def token_shares(self, policy: ResponseLogps, counted: torch.Tensor) -> torch.Tensor:
        return policy.per_token(counted / self.max_completion_length)


@dataclass(frozen=True, kw_only=True)
class DAPO(ClippedPolicyGradient):
    """DAPO: GRPO as a mean over all tokens, with a higher upper clip: ``clip(w_t, 1 - e_low, 1 + e_high)``.

    Equation 8 of Yu et al. 2025 (arXiv 2503.14476).
    """

    epsilon_high: float | None = 0.28
    """e_high; None is `epsilon`."""

    dynamic_sampling: bool = False
    """Leave out groups whose scores are all equal (equation 11 there): they have no advantage."""

    name = "dapo"
    unit = "tokens"

    def counted_indices(self, group: Group) -> list[int]:
        if self.dynamic_sampling and not self.has_advantages(group):
            return []
        return super().counted_indices(group)


@dataclass(frozen=True, kw_only=True)
class BNPO(ClippedPolicyGradient):
    """BNPO as in TRL: GRPO as a mean over all tokens.

    TRL takes the mean over each micro-batch; here it runs over the tokens of the optimizer step, however it is cut.
    """

    name = "bnpo"
    unit = "tokens"


@dataclass(frozen=True, kw_only=True)
class CISPO(PolicyGradient):
    """CISPO: the mean over all tokens of ``-min(w_t, w_max) A log pi_t``, with no gradient through w_t.

    Equation 4 of MiniMax 2025 (MiniMax-M1, arXiv 2506.13585): no token is left without gradient.
    """

    max_ratio: float = 5.0
    """w_max; `epsilon_high` of TRL's cispo."""

    name = "cispo"
    unit = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, max_ratio=self.max_ratio)

    def token_losses(self, logps: torch.Tensor, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        return -ratios.detach().clamp(max=self.max_ratio) * advantages * logps

    def clip_metrics(self, ratios: torch.Tensor, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"cispo_clip_ratio": ((ratios > self.max_ratio) & (advantages > 0)).to(ratios.dtype)}


@dataclass(frozen=True, kw_only=True)
class GSPO(ClippedPolicyGradient):
    """GSPO: the mean over responses of ``-min(w A, clip(w, 1 - e_low, 1 + e_high) A)``, w of the whole response.

    ``w = exp(1/T sum_t (log pi_t - log old_t))``, A as in GRPO. Equations 5 to 7 of Zheng et al. 2025
    (arXiv 2507.18071).
    """

    epsilon: float = 3e-4
    """e_low; ratios of whole responses stay near 1."""

    epsilon_high: float | None = 4e-4
    """e_high; None is `epsilon`."""

    name = "gspo"
    ratio_level = "sequence_mean"


@dataclass(frozen=True, kw_only=True)
class RLOO(ClippedPolicyGradient):
    """RLOO: the mean over responses of ``-min(w A, clip(w, 1 - e, 1 + e) A)``, w the ratio of the whole responses.

    ``A = s - mean of the others' s`` in the group, ``w = exp(sum_t (log pi_t - log old_t))``. Ahmadian et al. 2024
    (arXiv 2402.14740), section 3.2; the clip is TRL's. The KL term is a part of the scores: ``s - beta sum_t D_t``,
    D of the old log-probs.
    """

    scale_rewards: str = "none"
    """Advantages are divided by nothing, or by the ``group``'s standard deviation."""

    kl_estimator: str = "k1"
    """``k1``, ``k2`` or ``k3``; see `kvpref.losses.policy_gradient.kl_estimators.KL_ESTIMATORS`."""

    correct_kl: bool = False
    """Must be False for this loss, whose KL term has no gradient."""

    name = "rloo"
    ratio_level = "sequence_sum"
    baseline = "leave_one_out"
    kl_in_rewards = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correct_kl:
            raise InputError("rloo: its KL term is a part of the scores and has no gradient to correct")
        if self.advantages == TURN_SCORES:
            raise InputError(
                "rloo: scores by turn have no baseline of the other responses; take grpo or dr_grpo, or give an "
                "advantage per turn in a column of another name"
            )
        if self.beta > 0 and self.advantages != "scores":
            raise InputError("rloo: its KL term is a part of the scores; with advantages from a column beta must be 0")
        if self.beta > 0 and self.old == "reference":
            raise InputError("rloo: samples from the reference have no KL to it; with old='reference' beta must be 0")
