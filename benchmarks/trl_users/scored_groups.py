"""Groups of four responses with scores, from a file or made up."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from peers.made_up import NUM_WORDS, made_up_task
from peers.task import Task

from kvpref.data import PreferenceDataset, load_preferences
from kvpref.data.reading.tokenization import load_tokenizer
from kvpref.records.groups import Group
from trl_users.interface import Source

RESPONSES = 4


def load_scored_groups(source: Source, work_dir: Path, keep: Callable[[Group], bool]) -> Task:
    """The groups of a JSONL file with fields prompt, responses and scores that `keep` accepts.

    Raises:
        InputError: If the data or the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(str(source.tokenizer))
    groups = load_preferences(str(source.data), tokenizer)
    return Task(
        rows=(),
        groups=PreferenceDataset(group for group in groups if keep(group)),
        tokenizer=tokenizer,
        model_settings=json.loads(source.model.read_text()),
        work_dir=work_dir,
    )


def made_up_scored_groups(work_dir: Path, *, num_groups: int = 12, seed: int = 0) -> Task:
    """Groups of random words, one right response in each, for a model of two layers."""
    generator = random.Random(seed)

    def words(fewest: int, most: int) -> str:
        return "".join(f" w{generator.randrange(1, NUM_WORDS)}" for _ in range(generator.randint(fewest, most)))

    scores = [0.0] * (RESPONSES - 1) + [1.0]
    rows = [
        {"prompt": words(30, 40), "responses": [words(3, 12) for _ in scores], "scores": scores}
        for _ in range(num_groups)
    ]
    data = work_dir / "made_up_groups.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = made_up_task(work_dir)
    # Classifiers take the last token that is no padding, so padding must not be the token that ends a text.
    task.tokenizer.pad_token = "w0"
    return replace(task, rows=(), groups=load_preferences(str(data), task.tokenizer))


def num_right(group: Group) -> int:
    """Number of responses with score 1."""
    assert group.scores is not None
    return sum(score == 1 for score in group.scores)
