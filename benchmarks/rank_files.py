"""Token counts of real files, as groups for plans of many ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpref import Group, Sequence
from kvpref.data import Clusters, GroupLengths, PreferenceDataset, load_preferences, load_tokenizer
from kvpref.plan.sharing import DEFAULT_MIN_SHARED_TOKENS

TOKENIZER = "tokenizers/gpt_neox_20b"
FILES: Mapping[str, str] = {
    "hh_harmless": "data/hh_harmless_pairs.jsonl",
    "gsm8k": "data/gsm8k_groups.jsonl",
    "squality": "data/squality_groups.jsonl",
    "tau": "data/tau_airline_trajectories.jsonl",
}
"""Files by the name of a workload."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The groups of a file, without their tokens."""

    lengths: list[GroupLengths]
    clusters: Clusters | None
    """Which groups begin alike; None if none do."""

    copies: int = 1
    """How often the file's groups are repeated in it."""

    def repeated(self, copies: int) -> Measured:
        """The file repeated `copies` times, with groups of the same lengths that begin like none of another copy."""
        clusters = None
        if self.clusters is not None:
            size = len(self.lengths)
            clusters = Clusters(
                of_group=tuple(start + first for start in _starts(size, copies) for first in self.clusters.of_group),
                shared_tokens=self.clusters.shared_tokens * copies,
                min_shared_tokens=self.clusters.min_shared_tokens,
            )
        return Measured(lengths=self.lengths * copies, clusters=clusters, copies=copies)


class RealGroups:
    """Reads each file once.

    Args:
        shared: The folder with `data` and `tokenizers`.
    """

    def __init__(self, shared: Path) -> None:
        self._shared = shared
        self._datasets: dict[str, PreferenceDataset] = {}

    def measured(self, name: str, groups_per_step: int) -> Measured:
        """The groups of a file, and which of them begin alike, for steps of `groups_per_step` groups.

        The file is repeated until it fills four steps.
        """
        dataset = self._dataset(name)
        # A beginning is common, and makes no cluster, by its share of the groups: the file's, however often it is
        # repeated.
        clusters = dataset.clusters(min(groups_per_step, len(dataset)), DEFAULT_MIN_SHARED_TOKENS)
        found = Measured(
            lengths=dataset.batching_lengths(DEFAULT_MIN_SHARED_TOKENS),
            clusters=clusters if clusters.num_sharing_groups else None,
        )
        return found.repeated(max(1, -(-4 * groups_per_step // len(dataset))))

    def _dataset(self, name: str) -> PreferenceDataset:
        if name not in self._datasets:
            path = self._shared / FILES[name]
            tokenizer = load_tokenizer(str(self._shared / TOKENIZER))
            if name == "tau":
                self._datasets[name] = PreferenceDataset(_trajectories(path, tokenizer))
            else:
                self._datasets[name] = load_preferences(str(path), tokenizer)
        return self._datasets[name]


def _starts(size: int, copies: int) -> range:
    return range(0, size * copies, size)


def _trajectories(path: Path, tokenizer: Any) -> Iterator[Group]:
    """A task is a group; each attempt at it one sequence, in which what the agent wrote is scored."""
    for line in path.read_text().splitlines():
        row = json.loads(line)
        attempts = [_conversation(attempt["messages"], tokenizer) for attempt in row["trajectories"]]
        yield Group(attempts, scores=[attempt["score"] for attempt in row["trajectories"]], id=str(row["id"]))


def _conversation(messages: list[dict[str, Any]], tokenizer: Any) -> Sequence:
    ids: list[int] = []
    scored: list[bool] = []
    for message in messages:
        calls = json.dumps(message["tool_calls"]) if message.get("tool_calls") else ""
        for text, is_scored in (
            (f"<|{message['role']}|>\n", False),
            (f"{message.get('content') or ''}{calls}\n", message["role"] == "assistant"),
        ):
            tokens = tokenizer.encode(text, add_special_tokens=False)
            ids += tokens
            scored += [is_scored] * len(tokens)
    return Sequence(ids, scored)
