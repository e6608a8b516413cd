"""`Sharing`: which shared runs of tokens a prefix tree stores once."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, replace

from kvpref.plan.passes import Reads
from kvpref.prefix.building import build_tree
from kvpref.prefix.choice import Limits, states_pass_tokens
from kvpref.prefix.tree import PrefixTree
from kvpref.records.groups import Sequence

DEFAULT_MIN_SHARED_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Which shared runs of tokens become segments of their own.

    Raises:
        ValueError: If a number is out of range.
    """

    min_shared_tokens: int = DEFAULT_MIN_SHARED_TOKENS
    """Shared runs with fewer tokens than this are repeated."""

    max_depth: int | None = None
    """Deepest segment; 1 allows prompts and responses, None any depth."""

    whole_prompts: bool = False
    """Share prompts as wholes or not at all, for models in which all tokens of a prompt see one another."""

    whole_segments: bool = False
    """Let sequences branch off only at the ends of segments, for models whose layers carry a state from token to token.
    A tree may then have as many levels as places where sequences part."""

    pass_tokens: int = 0
    """Tokens that each pass beyond the second has to save."""

    def __post_init__(self) -> None:
        # Trees are built later, and their limits are to be refused where they are given.
        Limits(min_shared_tokens=self.min_shared_tokens, max_depth=self.max_depth, pass_tokens=self.pass_tokens)

    def under(self, reads: Reads) -> Sharing:
        """These settings with what a model of these `reads` requires."""
        return replace(
            self,
            whole_prompts=self.whole_prompts or reads.spans == "prompts",
            whole_segments=self.whole_segments or reads.states,
            pass_tokens=max(self.pass_tokens, states_pass_tokens(self.min_shared_tokens) if reads.states else 0),
        )

    def tree(self, parts: AbstractSequence[Sequence]) -> PrefixTree:
        """The prefix tree over parts of sequences."""
        keys = None  # compare the tokens themselves
        if self.whole_prompts:
            keys = [part.whole_prompt_ids for part in parts]
        elif any(part.images for part in parts):
            keys = [part.tree_ids for part in parts]
        return build_tree(
            [part.ids for part in parts],
            min_shared_tokens=self.min_shared_tokens,
            max_depth=self.max_depth,
            pass_tokens=self.pass_tokens,
            branches_inside=not self.whole_segments,
            keys=keys,
        )
