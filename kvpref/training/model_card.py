"""The model card, ``README.md`` beside a model: what it was trained from, on and with."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from kvpref.atomic_files import write_text

CARD_FILE = "README.md"

_MARK = re.compile(r"<!-- written by kvpref, sha256 of the lines above: ([0-9a-f]{64}) -->\n\Z")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PAPER = re.compile(r"([A-Z][\w'-]+(?: et al\.| and [A-Z][\w'-]+)? \d{4}) \((?:[^()]*, )?arXiv (\d{4}\.\d{4,5})\)")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says. Tables are label -> text; an empty one is left out."""

    title: str
    """Of the page."""

    base_model: str | None
    """Folder or hub name; None for random weights."""

    datasets: tuple[str, ...]
    """Files or hub names."""

    library: str
    """What loads the model: ``transformers`` or ``peft``."""

    task: str
    """The hub's name of what it is for, such as ``text-generation``."""

    tags: tuple[str, ...]
    """Words that it is found by."""

    summary: str
    """One paragraph."""

    training: Mapping[str, str]
    """How it was trained."""

    evaluation: Mapping[str, float]
    """Metrics on the evaluation data."""

    versions: Mapping[str, str]
    """By package."""

    papers: tuple[tuple[str, str], ...]
    """Who, and the arXiv number."""

    metadata: Mapping[str, Any]
    """More for the head of the page, such as ``license``."""


def write_card(folder: Path, facts: CardFacts) -> bool:
    """Write the card of the model in a folder, unless somebody else wrote or changed the one that is there.

    Returns:
        Whether it was written.

    Raises:
        RunError: If it cannot be written.
    """
    path = folder / CARD_FILE
    if path.exists() and not is_own(path):
        return False
    text = card_text(facts)
    write_text(path, f"{text}<!-- written by kvpref, sha256 of the lines above: {_digest(text)} -->\n")
    return True


def is_own(path: Path) -> bool:
    """Whether a card is as `write_card` left it."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    mark = _MARK.search(text)
    return mark is not None and mark.group(1) == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def card_text(facts: CardFacts) -> str:
    """The page in Markdown, with the hub's metadata at its head."""
    head = ModelCardData(
        base_model=hub_name(facts.base_model),
        datasets=[name for name in map(hub_name, facts.datasets) if name is not None] or None,
        library_name=facts.library,
        model_name=facts.title,
        pipeline_tag=facts.task,
        tags=list(facts.tags),
        **facts.metadata,
    )
    sections = [
        f"---\n{head.to_yaml()}\n---",
        f"# {facts.title}",
        facts.summary,
        *_table("## Training", "setting", facts.training),
        *_table("## Evaluation", "metric", {name: f"{value:.4g}" for name, value in facts.evaluation.items()}),
        *_table("## Framework versions", "package", facts.versions),
        *_citations(facts.papers),
    ]
    if "license" not in facts.metadata:
        sections.append("License: none is stated here; add `license:` to the head of this file.")
    return "\n\n".join(sections) + "\n\n"


def _table(title: str, label: str, rows: Mapping[str, str]) -> Iterable[str]:
    if rows:
        lines = [f"| {label} | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in rows.items())]
        yield f"{title}\n\n" + "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _citations(papers: tuple[tuple[str, str], ...]) -> Iterable[str]:
    if papers:
        lines = [f"- {who}, [arXiv {number}](https://arxiv.org/abs/{number})" for who, number in papers]
        yield "## Citation\n\nThe training objective is from:\n\n" + "\n".join(lines)


def hub_name(source: str | None) -> str | None:
    """`source` where it can be the name of something on the hub; None for what is on this machine."""
    if source is None or Path(source).exists():
        return None
    name = source.partition(":")[0].partition("[")[0]  # of a dataset, without its split
    return name if _HUB_NAME.fullmatch(name) and Path(name).suffix not in _FILES else None


_FILES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".gz")


def public_name(source: str) -> str:
    """What a card calls a model or data: files and folders of this machine without their path."""
    return source if hub_name(source) is not None else Path(source).name


def papers_of(*texts: str) -> tuple[tuple[str, str], ...]:
    """(who, arXiv number) of each paper that docstrings name, each once."""
    found = (match.groups() for text in texts for match in _PAPER.finditer(" ".join(text.split())))
    return tuple(dict.fromkeys((who, number) for who, number in found))
