"""Workloads from real files: Anthropic HH, mixed pairs, GSM8K, SQuALITY and game of 24."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_models import DRY_RUN, LONG_CONTEXT, SMALL, LlamaSizes
from options import SweepOptions
from workloads import Builders, Shape, Workload, make_groups, one_micro_batch

from kvpref import Group, Sequence
from kvpref.profiling.compare.modes import Cut

TOKENIZER = "gpt_neox_20b"
BAR = 0.88


@dataclass(frozen=True, kw_only=True)
class RealFile:
    """How to take a step from a file."""

    file: str
    """Name in the shared data."""

    sizes: LlamaSizes
    """The model. Token ids are taken modulo its vocabulary: equal prefixes stay equal; tokens that then coincide make
    prefixes a little longer, which the ideal, counted on the same tokens, takes into account."""

    max_tokens: int
    """Tokens of the whole step with repeated prompts, half of it with `--quick`; there is at least one row."""

    max_responses: int | None = None
    """Keep the first responses of a group, up to this many. None keeps all."""

    stories: bool = False
    """Take whole stories (rows that begin alike), each as one micro-batch, instead of rows."""

    quick: bool = False
    """Whether `--quick` runs it."""

    dry_responses: int = 2
    """Responses per group in a dry run."""


FILES = {
    "hh_harmless": RealFile(file="hh_harmless_pairs", sizes=SMALL, max_tokens=4096, quick=True),
    "mixed": RealFile(file="mixed_pairs", sizes=SMALL, max_tokens=4096),
    "gsm8k": RealFile(file="gsm8k_groups", sizes=SMALL, max_tokens=4096, quick=True, dry_responses=4),
    "game24 N=10": RealFile(file="game24_groups", sizes=SMALL, max_tokens=9216, max_responses=10, dry_responses=10),
    "game24 N=100": RealFile(file="game24_groups", sizes=SMALL, max_tokens=32768, dry_responses=100),
    "squality flat": RealFile(
        file="squality_groups", sizes=LONG_CONTEXT, max_tokens=32768, quick=True, dry_responses=6
    ),
    "squality stories": RealFile(
        file="squality_groups", sizes=LONG_CONTEXT, max_tokens=32768, stories=True, dry_responses=6
    ),
}


def real_files(options: SweepOptions) -> Builders:
    """One workload per entry of `FILES`."""
    return {name: _builder(source, options) for name, source in FILES.items() if source.quick or not options.quick}


def _builder(source: RealFile, options: SweepOptions) -> Callable[[], Workload]:
    def build() -> Workload:
        groups, sizes = read_groups(source, options), DRY_RUN if options.dry_run else source.sizes
        return Workload(sizes=sizes, cuts=_cut(groups, source), bar=None if options.dry_run else BAR)

    return build


def _cut(groups: list[Group], source: RealFile) -> dict[str, Cut]:
    """Short groups together; a question over a long prompt is its own micro-batch, unless the story is shared."""
    if source.sizes is LONG_CONTEXT and not source.stories:
        return {mode: [[group] for group in groups] for mode in one_micro_batch(groups)}
    return one_micro_batch(groups)


def read_groups(source: RealFile, options: SweepOptions) -> list[Group]:
    """The groups of one step; made up in a dry run."""
    return _made_up(source) if options.dry_run else _read(source, options)


def spread_order(count: int) -> list[int]:
    """All of `range(count)` in an order with evenly spread beginnings: multiples of the golden ratio."""
    places = (int(count * math.modf(index * (math.sqrt(5) - 1) / 2)[0]) for index in range(4 * count))
    order = list(dict.fromkeys(places))
    return order + [index for index in range(count) if index not in set(order)]


def _read(source: RealFile, options: SweepOptions) -> list[Group]:
    path = options.shared_file(f"data/{source.file}.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    units = _stories(rows) if source.stories else [[row] for row in rows]
    order = spread_order(len(units))
    # Tokenizing more rows than fit is cheaper than tokenizing the file; few rows have less than 16 tokens.
    candidates = [units[index] for index in order[: max(1, min(len(units), source.max_tokens // 16))]]
    if source.stories or source.sizes is LONG_CONTEXT:
        candidates = candidates[:1]
    groups = iter(_tokenize([_trim(row, source) for unit in candidates for row in unit], source, options))
    taken: list[Group] = []
    for unit in candidates:
        new = [next(groups) for _ in unit]
        if taken and _total_tokens(taken + new) > source.max_tokens // (2 if options.quick else 1):
            break
        taken += new
    return taken


def _stories(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    stories: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        stories.setdefault(row["prompt"][:1000], []).append(row)
    return list(stories.values())


def _trim(row: dict[str, Any], source: RealFile) -> dict[str, Any]:
    if source.max_responses is None:
        return row
    return {**row, **{name: row[name][: source.max_responses] for name in ("responses", "scores")}}


def _tokenize(rows: list[dict[str, Any]], source: RealFile, options: SweepOptions) -> list[Group]:
    # Imported here, so that the rows for GPUs do not need the data layer.
    from kvpref.data import load_preferences, load_tokenizer

    tokenizer = load_tokenizer(str(options.shared_file(f"tokenizers/{TOKENIZER}")))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [_fold(group, source.sizes.vocab_size) for group in load_preferences(str(path), tokenizer)]


def _fold(group: Group, vocab_size: int) -> Group:
    """Token ids modulo the vocabulary."""
    sequences = [Sequence([token % vocab_size for token in s.input_ids], s.scored) for s in group.sequences]
    return Group(sequences, scores=group.scores, labels=group.labels, id=group.id)


def _total_tokens(groups: list[Group]) -> int:
    return sum(len(sequence) for group in groups for sequence in group.sequences)


def _made_up(source: RealFile) -> list[Group]:
    """A dry run's groups: two, or two questions about one story."""
    shape = Shape(prompt=24, response=3, responses=source.dry_responses, groups=2)
    groups = make_groups(shape, DRY_RUN.vocab_size)
    if not source.stories:
        return groups
    story = list(groups[0].sequences[0].input_ids)
    return [
        Group(
            [Sequence([*story, *s.input_ids], [*[False] * len(story), *s.scored]) for s in group.sequences],
            scores=group.scores,
        )
        for group in groups
    ]
