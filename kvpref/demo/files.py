"""The demonstration's files without its training: a model, its tokenizer and data, to begin with."""

from __future__ import annotations

from pathlib import Path

from kvpref.atomic_files import write_text
from kvpref.demo.model import build_model, build_tokenizer
from kvpref.demo.task import make_groups, make_pairs, write_groups, write_pairs
from kvpref.demo.warm_up import warm_up
from kvpref.errors import InputError

RESULT_FILE, PLOT_FILE, MODEL_FOLDER = "demo.json", "demo.png", "model"
NUM_TRAIN, NUM_EVAL = 1024, 256


def write_files(output: str | Path, seed: int = 0) -> None:
    """Write what a first training needs: a tiny model, its tokenizer, and data. Takes some seconds.

    The folder then holds `model`, as `from_pretrained` loads it, trained until it answers most questions right;
    `train.jsonl` and `eval.jsonl` with pairs; and `train_groups.jsonl` and `eval_groups.jsonl` with the same prompts,
    each with four answers and their scores.

    Args:
        output: The folder; one that an earlier demonstration wrote is replaced.
        seed: Seed of the data and the weights.

    Raises:
        InputError: If `output` is a file, or a folder with other files.
    """
    folder = Path(output)
    claim(folder)
    train, held_out = make_pairs(seed, NUM_TRAIN, NUM_EVAL)
    for name, pairs in (("train", train), ("eval", held_out)):
        write_pairs(pairs, folder / f"{name}.jsonl")
        write_groups(make_groups(seed, pairs), folder / f"{name}_groups.jsonl")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    warm_up(model, tokenizer, train)
    model.save_pretrained(folder / MODEL_FOLDER)
    tokenizer.save_pretrained(folder / MODEL_FOLDER)


def claim(output: Path) -> None:
    """Mark the folder as a demonstration's, and remove what an earlier one left that would be refused or stale.

    Raises:
        InputError: If `output` is a file, or a folder with other files.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; choose a folder as --output")
    if output.is_dir() and any(output.iterdir()) and not (output / RESULT_FILE).exists():
        raise InputError(f"{output}: the folder is not empty and holds no earlier demo; choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    # Written first, so that a run that was stopped can be repeated in the same folder.
    write_text(output / RESULT_FILE, "{}\n")
    (output / PLOT_FILE).unlink(missing_ok=True)
    (output / "dpo" / "reference_logps" / "train.safetensors").unlink(missing_ok=True)
