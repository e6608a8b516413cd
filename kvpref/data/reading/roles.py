"""Roles that are misspelt: a template may write such a turn as it stands, and then nobody scores it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from kvpref.data.reading.messages import Message, RowError
from kvpref.data.reading.response_spans import ChatTemplate

KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Roles that chat templates write; each may know others."""

_LEAST_LIKENESS = 0.8
"""As `difflib` counts it; names that stand for something else (tools, observation, documents) are further away or end
in another letter only."""


def check_roles(template: ChatTemplate, messages: Iterable[Message], name: str) -> None:
    """Refuse a role that is a known one misspelt, unless the template names it.

    Args:
        template: That writes the messages.
        messages: Of one conversation.
        name: What errors call it.

    Raises:
        RowError: Naming the role and the one that is meant.
    """
    for index, message in enumerate(messages):
        role = message["role"]
        if role in KNOWN_ROLES:
            continue
        meant = _meant(role)
        if meant is not None and not any(_names(source, role) for source in template.sources()):
            raise RowError(
                f"turn {index + 1} of {name} has the role {role!r}, which the chat template does not name; it would "
                f"not be taken as one of role {meant!r}: correct it"
            )


def _meant(role: str) -> str | None:
    """The known role that this one nearly is; None where it may be one of its own, such as a plural."""
    lowered = role.strip().lower()
    if lowered in KNOWN_ROLES:
        return lowered
    close = get_close_matches(lowered, KNOWN_ROLES, n=1, cutoff=_LEAST_LIKENESS)
    return close[0] if close and lowered != f"{close[0]}s" else None


def _names(source: str, role: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(role)}(?!\w)", source) is not None
