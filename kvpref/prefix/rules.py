"""Rules: which tokens of its own sequence a token sees in the attention layers of one kind."""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = ("causal", "window", "chunk", "dense")


@dataclass(frozen=True)
class Rule:
    """Which keys at positions k a query at position q sees, both positions inside the sequence.

    Without `bidirectional`, a query sees only itself and earlier tokens.
    """

    kind: str
    """``causal``: k <= q. ``window``: and q - k < size. ``chunk``: and k // size == q // size. ``dense``: an
    arbitrary subset of the keys k <= q, given by `ranges`."""

    size: int = 0
    """Tokens of a window or a chunk; 0 for the others."""

    ranges: tuple[tuple[tuple[int, int], ...], ...] = field(default=(), repr=False)
    """``dense``: per query position the ranges [first, stop) of key positions it sees, in order."""

    bidirectional: bool = False
    """``causal``, ``window``: a token also sees the later ones of its span, such as an image."""

    whole_spans: bool = False
    """``window`` with `bidirectional`: also the earlier tokens of its span that are outside the window."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown rule {self.kind!r}; choose from: {', '.join(KINDS)}")
        if self.bidirectional and self.kind not in ("causal", "window"):
            raise ValueError(f"tokens under a {self.kind} rule cannot see later ones")
        if self.whole_spans and not (self.bidirectional and self.kind == "window"):
            raise ValueError("spans can be seen whole only under a bidirectional window rule")
        sized = self.kind in ("window", "chunk")
        if sized != (self.size > 0) or self.size < 0:
            expected = "a size of at least 1" if sized else "no size"
            raise ValueError(f"a {self.kind} rule takes {expected}; got {self.size}")
        if (self.kind == "dense") != bool(self.ranges):
            raise ValueError(
                f"a dense rule, and no other, takes the ranges that each query sees; this one is {self.kind}"
            )

    def first_key(self, position: int) -> int:
        """The smallest position that a query at `position` may see under a causal, window or chunk rule."""
        return _FIRST_KEYS[self.kind](position, self.size)

    def __str__(self) -> str:
        name = f"{self.kind} of {self.size}" if self.size else self.kind
        return f"{name}, both ways inside images" if self.bidirectional else name


_FIRST_KEYS = {
    "causal": lambda position, size: 0,
    "dense": lambda position, size: 0,
    "window": lambda position, size: max(0, position - size + 1),
    "chunk": lambda position, size: position - position % size,
}

CAUSAL = Rule("causal")
