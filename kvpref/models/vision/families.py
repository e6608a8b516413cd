"""The model families that are exact with images, and what each needs.

`benchmarks/census.py --task image` finds them on tiny models, in every mode, against each sequence alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VisionFamily:
    """What a family's models cannot tell themselves."""


VISION: dict[str, VisionFamily] = {
    "gemma3": VisionFamily(),
    "llava": VisionFamily(),
    "qwen2_5_vl": VisionFamily(),
    "qwen2_vl": VisionFamily(),
    "qwen3_vl": VisionFamily(),
    "qwen3_vl_moe": VisionFamily(),
}
