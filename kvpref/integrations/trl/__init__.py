"""TRL's trainers with shared prompts encoded once.

Import the trainer from here in place of TRL's; arguments, data, metrics and checkpoints stay TRL's. Only the forwards
behind log-probs and rewards change: they run through kvpref's engine and give the same numbers, to rounding.
"""

from typing import TYPE_CHECKING, Any

try:
    from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head  # noqa: F401
except ImportError as error:
    raise ImportError('kvpref.integrations.trl needs TRL 1.16 or later: pip install "kvpref[trl]"') from error

from kvpref.integrations.trl.refusals import REFUSALS, Refusal
from kvpref.integrations.trl.replacements import REPLACEMENTS, Replacement
from kvpref.integrations.trl.trainers import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer
from kvpref.integrations.trl.tree_forward import tree_row_logps

if TYPE_CHECKING:
    from kvpref.integrations.trl.async_grpo import AsyncGRPOTrainer

__all__ = [
    "REFUSALS",
    "REPLACEMENTS",
    "AsyncGRPOTrainer",
    "DPOTrainer",
    "GRPOTrainer",
    "KTOTrainer",
    "Refusal",
    "Replacement",
    "RewardTrainer",
    "tree_row_logps",
]


def __getattr__(name: str) -> Any:
    # TRL warns where its experimental trainers are imported.
    if name != "AsyncGRPOTrainer":
        raise AttributeError(f"module 'kvpref.integrations.trl' has no attribute {name!r}")
    from kvpref.integrations.trl.async_grpo import AsyncGRPOTrainer

    return AsyncGRPOTrainer
