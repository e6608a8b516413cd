"""A tiny vision-language model with its processor in a folder, pictures in files, and rows that name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pictures
from vision_families import FAMILIES, build_vision_processor
from vision_models import own_inputs, picture, tiny_vision_model

from kvpref.data import load_preferences

QUESTIONS = ("What is it?", "Which colour?", "Say more.")
ANSWERS = (" A cat", " A dog.", " Red", " Nothing at all")


def save_model(name: str, folder: Path) -> Path:
    """The tiny model of a family, with its processor."""
    tiny_vision_model(name).save_pretrained(folder)
    build_vision_processor(name).save_pretrained(folder)
    return folder


def write_pairs(folder: Path, num_rows: int = 6) -> Path:
    """Preference pairs of messages: one image, two, or none, some images in several rows."""
    return _write(folder, "pairs.jsonl", [_pair(index) for index in range(num_rows)])


def write_groups(folder: Path, num_rows: int = 6) -> Path:
    """Prompts of messages with an image, three responses each, and their scores."""
    return _write(folder, "groups.jsonl", [_group(index) for index in range(num_rows)])


def _pair(index: int) -> dict[str, Any]:
    first, second = ANSWERS[index % 4], ANSWERS[(index + 1) % 4]
    return _prompt(index) | {"chosen": _reply(first), "rejected": _reply(second)}


def _group(index: int) -> dict[str, Any]:
    answers = [ANSWERS[(index + offset) % 4] for offset in range(3)]
    scores = [float((index + offset) % 3) for offset in range(3)]
    return _prompt(index) | {"responses": [_reply(answer) for answer in answers], "scores": scores}


def _prompt(index: int) -> dict[str, Any]:
    images = [f"pictures/{index % 4}.png", f"pictures/{(index + 1) % 4}.png"][: (1, 2, 0)[index % 3]]
    text = {"type": "text", "text": QUESTIONS[index % len(QUESTIONS)]}
    content = [*({"type": "image"} for _ in images), text]
    return {"prompt": [{"role": "user", "content": content}], **({"images": images} if images else {})}


def _reply(answer: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}]


def _write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for index in range(4):
        picture(index, 30 + 12 * index, 24 + 6 * index).save(folder / "pictures" / f"{index}.png")
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_inputs(name: str, data: Path) -> list[dict[str, Any]]:
    """What transformers' own forward takes for each response of a file of rows, in order (batch 1).

    The images come from the processor, as a user without kvpref would call it; the response's tokens from kvpref.
    """
    processor = build_vision_processor(name)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    found = []
    for row, group in zip(rows, load_preferences(str(data), processor), strict=True):
        pictures = [Pictures.open(data.parent / path).convert("RGB") for path in row.get("images", [])]
        text = processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        made = processor(text=text, images=pictures or None, return_tensors="pt")
        for sequence in group.sequences:
            prompt = made["input_ids"][0].tolist()
            assert list(sequence.input_ids[: len(prompt)]) == prompt
            found.append(own_inputs(FAMILIES[name], made, list(sequence.input_ids[len(prompt) :])))
    return found


@torch.no_grad()
def plain_logps(model: Any, name: str, data: Path) -> list[float]:
    """The log-prob of each response of a file of rows by the model's own forward, one sequence at a time."""
    groups = load_preferences(str(data), build_vision_processor(name))
    scored = [sequence.scored for group in groups for sequence in group.sequences]
    found = []
    for inputs, mask in zip(plain_inputs(name, data), scored, strict=True):
        logps = model(**inputs, use_cache=False).logits[0, :-1].log_softmax(-1)
        found.append(logps.gather(1, inputs["input_ids"][0, 1:, None]).squeeze(1)[torch.tensor(mask[1:])].sum().item())
    return found


@torch.no_grad()
def plain_rewards(model: Any, name: str, data: Path) -> list[float]:
    """The same of a reward model."""
    return [model(**inputs, use_cache=False).logits.item() for inputs in plain_inputs(name, data)]
