"""The single objectives by name; mixtures are made of them."""

from __future__ import annotations

from kvpref.losses.interface import PreferenceLoss
from kvpref.losses.pairs.aot import AOT, AOTUnpaired
from kvpref.losses.pairs.dpo import DPO, RobustDPO, SigmoidNorm
from kvpref.losses.pairs.margins import EXO, IPO, DiscoPOP, Hinge
from kvpref.losses.pairs.ratios import BCO, NCA, SPPO, APODown, APOZero
from kvpref.losses.pairs.reference_free import CPO, ORPO, AlphaPO, SimPO
from kvpref.losses.policy_gradient.methods import BNPO, CISPO, DAPO, GRPO, GSPO, RLOO, DrGRPO
from kvpref.losses.ranking import AllPairs, BestVsRest, LiPO, PlackettLuce
from kvpref.losses.rewards import BradleyTerry, PlackettLuceReward, RewardRegression
from kvpref.losses.sft import SFT, WeightedSFT
from kvpref.losses.unpaired import KTO, APOZeroUnpaired

OBJECTIVES: dict[str, type[PreferenceLoss]] = {
    # Pairs, against a reference
    "dpo": DPO,
    "robust": RobustDPO,
    "sigmoid_norm": SigmoidNorm,
    "hinge": Hinge,
    "ipo": IPO,
    "exo": EXO,
    "discopop": DiscoPOP,
    "nca": NCA,
    "bco": BCO,
    "sppo": SPPO,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    # Pairs, without a reference
    "simpo": SimPO,
    "alphapo": AlphaPO,
    "orpo": ORPO,
    "cpo": CPO,
    # Single responses, desirable or not
    "kto": KTO,
    "apo_zero_unpaired": APOZeroUnpaired,
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
