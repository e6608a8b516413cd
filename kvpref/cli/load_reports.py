"""The table that transformers logs of weights that are missing, of other shapes or left over, where it says news."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_LOGGER = "transformers.modeling_utils"
_TITLE = "LOAD REPORT"

Info = dict[str, Any]
"""What ``output_loading_info`` gives: ``missing_keys``, ``unexpected_keys``, ``mismatched_keys``, ``error_msgs``."""


def load_quietly(load: Callable[[], tuple[Any, Info]], is_expected: Callable[[Info], bool]) -> tuple[Any, Info]:
    """What `load` returns; the table is logged, unless all that it would say is expected.

    Args:
        load: Loads a model with its loading info.
        is_expected: Whether a loading info is no news.

    Raises:
        Exception: As `load`, whose message may point to the table; it is logged before.
    """
    with _held() as tables:
        model, info = load()
        if is_expected(info):
            tables.clear()
        return model, info


@contextmanager
def _held() -> Iterator[list[logging.LogRecord]]:
    """While open, tables are kept back; in the end those that are left in the list are logged."""
    logger, tables = logging.getLogger(_LOGGER), list[logging.LogRecord]()

    def hold(record: logging.LogRecord) -> bool:
        is_table = _TITLE in str(record.msg)
        if is_table:
            tables.append(record)
        return not is_table

    logger.addFilter(hold)
    try:
        yield tables
    finally:
        logger.removeFilter(hold)
        for record in tables:
            logger.handle(record)
