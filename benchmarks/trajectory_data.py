"""Trajectories of agents as groups: real ones, whole and as one row per model call, and made-up ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np
from options import SweepOptions

from kvpref import Group, Sequence

FILE = "data/tau_airline_trajectories.jsonl"
TOKENIZER = "tokenizers/gpt_neox_20b"
Rows = Literal["whole", "per call"]
Message = dict[str, Any]
Rendered = list[tuple[np.ndarray, bool]]
"""Per message its token ids, and whether the model wrote it."""


def read_trajectories(
    options: SweepOptions, rows: Rows, num_tasks: int | None = None, max_turns: int | None = None
) -> list[Group]:
    """One group per task, with the attempts at it.

    Args:
        options: Where the data is.
        rows: ``whole``: a sequence per attempt, in which every assistant turn is scored. ``per call``: a sequence per
            assistant turn, which is the history and this turn, and only that is scored.
        num_tasks: The first so many; None for all.
        max_turns: The first so many assistant turns of each attempt, and what is said before them; None for all.

    Raises:
        MissingDataError: If the file or its tokenizer is not there.
    """
    lines = options.shared_file(FILE).read_text().splitlines()[:num_tasks]
    encode = _encoder(options)
    return [_group(json.loads(line), rows, encode, max_turns) for line in lines]


def made_up_trajectories(
    rows: Rows, *, num_tasks: int = 2, attempts: int = 4, turns: int = 6, turn_tokens: int = 40, vocab_size: int = 1024
) -> list[Group]:
    """Attempts of random tokens that leave one another after a random number of turns."""
    generator = random.Random(f"{num_tasks} {attempts} {turns} {turn_tokens}")

    def message() -> np.ndarray:
        return np.array(generator.choices(range(vocab_size), k=turn_tokens), dtype=np.int64)

    system, groups = message(), []
    for task in range(num_tasks):
        known: list[Rendered] = []
        for _ in range(attempts):
            kept = known[0][: 1 + 2 * generator.randrange(turns)] if known else [(system, False)]
            fresh = [(message(), len(kept) % 2 != index % 2) for index in range(1 + 2 * turns - len(kept))]
            known.append([*kept, *fresh])
        sequences = [sequence for messages in known for sequence in _sequences(messages, rows)]
        groups.append(Group(sequences, scores=[float(index % 2) for index in range(len(sequences))], id=f"task {task}"))
    return groups


def _group(row: dict[str, Any], rows: Rows, encode: Callable[[str], np.ndarray], max_turns: int | None) -> Group:
    sequences, scores = [], []
    for attempt in row["trajectories"]:
        messages = attempt["messages"]
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"][:max_turns]
        kept = messages[: turns[-1] + 1] if max_turns is not None else messages
        rendered = [(encode(render_message(message)), message["role"] == "assistant") for message in kept]
        new = _sequences(rendered, rows)
        sequences += new
        scores += [attempt["score"]] * len(new)
    return Group(sequences, scores=scores, id=row["id"])


def _sequences(messages: Rendered, rows: Rows) -> list[Sequence]:
    flags = [np.full(len(ids), written) for ids, written in messages]
    if rows == "whole":
        return [Sequence(np.concatenate([ids for ids, _ in messages]), np.concatenate(flags))]
    found = []
    for stop in (index + 1 for index, (_, written) in enumerate(messages) if written):
        ids = np.concatenate([ids for ids, _ in messages[:stop]])
        scored = np.arange(len(ids)) >= len(ids) - len(messages[stop - 1][0])
        found.append(Sequence(ids, scored))
    return found


def render_message(message: Message) -> str:
    """As templates that write ChatML render a message and its tool calls."""
    body = message.get("content") or ""
    for call in message.get("tool_calls") or ():
        asked = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        body += f"\n<tool_call>\n{json.dumps(asked)}\n</tool_call>"
    return f"<|im_start|>{message['role']}\n{body}<|im_end|>\n"


def _encoder(options: SweepOptions) -> Callable[[str], np.ndarray]:
    """Token ids of a message by itself, so that equal histories are equal tokens; equal messages are encoded once."""
    # Here, so that made-up trajectories do without the data layer.
    from kvpref.data import load_tokenizer

    tokenizer = load_tokenizer(str(options.shared_file(TOKENIZER)))

    @cache
    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer(text)["input_ids"], dtype=np.int64)

    return encode
