"""The single objectives by name; mixtures are made of them."""

from __future__ import annotations

from kvpref.losses.dpo import DPO
from kvpref.losses.interface import PreferenceLoss
from kvpref.losses.sft import SFT

OBJECTIVES: dict[str, type[PreferenceLoss]] = {
    # Pairs, against a reference
    "dpo": DPO,
    # The best response
    "sft": SFT,
}
