"""Pictures of coloured shapes, and rows of preference data that ask about them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {
    "red": "#d62728",
    "green": "#2ca02c",
    "blue": "#1f4fd8",
    "yellow": "#f2d016",
    "purple": "#8e2fb8",
    "white": "#ffffff",
}
SHAPES = ("circle", "square", "triangle")
SIZE = 32
"""Pixels of a side."""


@dataclass(frozen=True)
class Scene:
    """One picture: its file, and the colours of its shapes."""

    path: str
    colours: dict[str, str]


def draw_scene(folder: Path, index: int, rng: random.Random) -> Scene:
    """Two shapes in two colours, each somewhere in a quarter of the picture, saved as a file."""
    colours = dict(zip(rng.sample(SHAPES, 2), rng.sample(sorted(COLOURS), 2), strict=True))
    picture = Image.new("RGB", (SIZE, SIZE), "#101014")
    canvas = ImageDraw.Draw(picture)
    half = SIZE // 2
    corners = rng.sample([(left, top) for left in (0, half) for top in (0, half)], 2)
    for (shape, colour), (left, top) in zip(colours.items(), corners, strict=True):
        size = half - 3 - rng.randint(0, 2)
        left, top = left + rng.randint(0, half - 1 - size), top + rng.randint(0, half - 1 - size)
        box = (left, top, left + size, top + size)
        if shape == "circle":
            canvas.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            canvas.rectangle(box, fill=COLOURS[colour])
        else:
            canvas.polygon([(left, top + size), (left + size, top + size), (left + size // 2, top)], COLOURS[colour])
    path = folder / "pictures" / f"{index}.png"
    picture.save(path)
    return Scene(f"pictures/{path.name}", colours)


def question(scene: Scene, shape: str) -> dict[str, Any]:
    """The prompt of a row: the picture, then the question."""
    parts = [{"type": "image"}, {"type": "text", "text": f"which colour is the {shape} ?"}]
    return {"prompt": [{"role": "user", "content": parts}], "images": [scene.path]}


def reply(colour: str) -> list[dict[str, str]]:
    """A response of a row."""
    return [{"role": "assistant", "content": colour}]


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    """A file of rows, beside the pictures that they name."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def preference(scene: Scene, shape: str, rng: random.Random) -> dict[str, Any]:
    """The right colour against a wrong one, half of the time that of the other shape."""
    right = scene.colours[shape]
    other = next(colour for name, colour in scene.colours.items() if name != shape)
    wrong = other if rng.random() < 0.5 else rng.choice([colour for colour in COLOURS if colour != right])
    return question(scene, shape) | {"chosen": reply(right), "rejected": reply(wrong)}


def all_answers(scene: Scene, shape: str) -> dict[str, Any]:
    """Every colour, and which is right."""
    scores = [float(colour == scene.colours[shape]) for colour in COLOURS]
    return question(scene, shape) | {"responses": [reply(colour) for colour in COLOURS], "scores": scores}
