"""The table that transformers logs of weights that are missing, of other shapes or left over, where it says news."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_LOGGER = "transformers.modeling_utils"
_TITLE = "LOAD REPORT"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ROW = re.compile(r"^(\S+) *\| (MISSING|UNEXPECTED|MISMATCH|CONVERSION)\b", re.MULTILINE)

NEW_HEAD = {"MISSING": "score.", "UNEXPECTED": "lm_head."}
"""What a table says of a reward model that starts from a language model: how these weights' names begin, by status."""


@contextmanager
def without_news(expected: Mapping[str, str]) -> Iterator[None]:
    """While open, tables in which all rows are expected are not logged; what cannot be read as a table is."""
    logger = logging.getLogger(_LOGGER)

    def is_news(record: logging.LogRecord) -> bool:
        text = _COLOUR.sub("", record.getMessage())
        rows = _ROW.findall(text) if _TITLE in text else []
        return not rows or any(not name.startswith(expected.get(status, " ")) for name, status in rows)

    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)
