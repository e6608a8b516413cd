"""TRL's trainers with shared prompts encoded once.

Import the trainer from here in place of TRL's; arguments, data, metrics and checkpoints stay TRL's. Only the forwards
behind log-probs and rewards change: they run through kvpref's engine and give the same numbers, to rounding.
"""

try:
    from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head  # noqa: F401
except ImportError as error:
    raise ImportError('kvpref.integrations.trl needs TRL 1.16 or later: pip install "kvpref[trl]"') from error

from kvpref.integrations.trl.refusals import REFUSALS, Refusal
from kvpref.integrations.trl.replacements import REPLACEMENTS, Replacement
from kvpref.integrations.trl.trainers import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer

__all__ = [
    "REFUSALS",
    "REPLACEMENTS",
    "DPOTrainer",
    "GRPOTrainer",
    "KTOTrainer",
    "Refusal",
    "Replacement",
    "RewardTrainer",
]
