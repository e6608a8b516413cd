"""Draws docs/layers.svg from the import contract in pyproject.toml: python docs/hooks/layer_picture.py"""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "layers.svg"
WHAT = {
    "cli": "commands: parse and print",
    "demo": "a task that checks itself",
    "profiling": "memory, time, predictions",
    "integrations": "TRL, padded calls, agent loops",
    "training": "a transformers.Trainer for preference data",
    "engine": "passes and schedules: combines all below",
    "parallel": "many ranks, sharded weights",
    "models": "the Hugging Face room: attention, masks, heads",
    "data": "rows to groups, batching",
    "losses": "functions of log-probs",
    "state": "what passes hand on",
    "plan": "tensors that say what runs",
    "ops": "attention, log-probs, recurrences: tensors in, tensors out",
    "records": "groups, requests, outputs",
    "prefix": "trees and levels as integers, without torch",
    "atomic_files": "",
    "ranks": "",
    "tracing": "",
    "errors": "",
}
COLORS = ("#4a6fa5", "#5b7f6b", "#8a6d9e", "#a8743d", "#6b6f76")
BANDS = {"cli": 0, "training": 1, "engine": 2, "data": 3, "plan": 3, "ops": 3, "records": 4}
"""Where a color begins: surface, training, engine room, parts, ground."""
LEFT, WIDTH, HEIGHT, GAP = 120, 640, 30, 6


def layers() -> list[list[str]]:
    """The layers of the contract from the top, each with the packages that stand side by side."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (contract for contract in contracts if contract["type"] == "layers")
    return [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]


def render() -> str:
    """The picture's text."""
    boxes, y, color = [], 20, 0
    for names in layers():
        color = BANDS.get(names[0], color)
        width = (WIDTH - GAP * (len(names) - 1)) / len(names)
        for index, name in enumerate(names):
            x = LEFT + index * (width + GAP)
            boxes.append(
                f'  <rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{HEIGHT}" rx="4" fill="{COLORS[color]}"/>\n'
                f'  <text x="{x + 10:.0f}" y="{y + 20}" fill="#ffffff">'
                f'<tspan font-weight="bold">{name}</tspan><tspan dx="10" font-size="12">{WHAT[name]}</tspan></text>\n'
            )
        y += HEIGHT + GAP
    end = y - GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {end + 20}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14">\n'
        f"  <title>The packages of kvpref; imports only go downward</title>\n"
        f'  <rect width="800" height="{end + 20}" fill="#ffffff"/>\n'
        f'  <path d="M60 24 V{end - 4} M52 {end - 14} L60 {end - 2} L68 {end - 14}" stroke="#444444" stroke-width="2" '
        'fill="none"/>\n'
        f'  <text transform="translate(48 {end // 2}) rotate(-90)" text-anchor="middle" fill="#222222">'
        f"imports only go downward</text>\n{''.join(boxes)}</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(render())
