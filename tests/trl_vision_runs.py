"""Questions about made-up pictures as TRL's trainers take them, and tiny vision-language models on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl_runs import Words
from vision_families import build_vision_processor
from vision_models import picture, tiny_vision_model


def save_model(name: str, path: Path) -> str:
    """A tiny model on disk, where TRL loads the reference from."""
    model = tiny_vision_model(name)
    model.config._attn_implementation = None
    model.save_pretrained(path)
    return str(path)


def make_processor(name: str, side: str = "right") -> Any:
    processor = build_vision_processor(name)
    processor.tokenizer.padding_side = side
    return processor


def _message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pairs(num_rows: int = 8) -> Dataset:
    """Pictures of several sizes, one or two in a row, and a row without; prompt, chosen and rejected."""
    words = Words()
    rows = [
        {
            "images": ([picture(index, 24 + 8 * (index % 3), 24)] + [picture(9)] * (index % 2)) * (index != 2),
            "prompt": _message("user", words.text(3, 5)),
            "chosen": _message("assistant", words.text(1, 4)),
            "rejected": _message("assistant", words.text(1, 4)),
        }
        for index in range(num_rows)
    ]
    return Dataset.from_list(rows)


def completions(num_rows: int = 8) -> Dataset:
    """Prompt, completion and label; neighbours answer one prompt."""
    halves = []
    for row in pairs(num_rows // 2):
        for name in ("chosen", "rejected"):
            halves.append(
                {"images": row["images"], "prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            )
    return Dataset.from_list(halves)


def prompts() -> Dataset:
    """Each with images: TRL's generation does not take batches in which some have none."""
    return pairs().select([0, 1, 3, 4]).remove_columns(["chosen", "rejected"])
