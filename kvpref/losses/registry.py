"""The single objectives by name; mixtures are made of them."""

from __future__ import annotations

from kvpref.losses.dpo import DPO
from kvpref.losses.interface import PreferenceLoss
from kvpref.losses.policy_gradient_clipped import BNPO, CISPO, DAPO, GRPO, GSPO, RLOO, DrGRPO
from kvpref.losses.ranking import AllPairs, BestVsRest, LiPO, PlackettLuce
from kvpref.losses.rewards import BradleyTerry, PlackettLuceReward, RewardRegression
from kvpref.losses.sft import SFT, WeightedSFT

OBJECTIVES: dict[str, type[PreferenceLoss]] = {
    # Pairs, against a reference
    "dpo": DPO,
    # N responses by their scores, against a reference
    "plackett_luce": PlackettLuce,
    "lipo": LiPO,
    "all_pairs": AllPairs,
    "best_vs_rest": BestVsRest,
    # Policy gradients from given rewards
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "bnpo": BNPO,
    "cispo": CISPO,
    "gspo": GSPO,
    "rloo": RLOO,
    # Reward models
    "bradley_terry": BradleyTerry,
    "plackett_luce_reward": PlackettLuceReward,
    "reward_regression": RewardRegression,
    # Likelihood: of the best response, or of all by weight
    "sft": SFT,
    "weighted_sft": WeightedSFT,
}
