"""The table that trl_users.py prints of what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LABELS = {
    "trl": "TRL's trainer",
    "shared_prefix": "the same, inside `kvpref.shared_prefix`",
    "integrations.trl": "the same class from `kvpref.integrations.trl`",
    "kvpref": "`kvpref.PreferenceTrainer`",
}


def table(results: Path) -> list[str]:
    """Markdown lines: a row per way to train, a column per workload."""
    workloads = json.loads((results / "trl_users.json").read_text())["workloads"]
    heads = " | ".join(f"{item['title']}, {item['data']}" for item in workloads)
    lines = [f"| an optimizer step with | {heads} |", f"| --- |{' --- |' * len(workloads)}"]
    for way, label in LABELS.items():
        cells = " | ".join(_cell(item["ways"][way]) for item in workloads)
        lines.append(f"| {label} | {cells} |")
    return lines


def _cell(way: dict[str, Any]) -> str:
    """Seconds, speed-up over TRL's trainer, tokens through the layers."""
    seconds = way["time_ms"]["median"] / 1000
    return f"{seconds:.2f} s, {way['speedup']['median']:.2f}x, {way['layer_tokens_per_step']:.0f} tokens"
