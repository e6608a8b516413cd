"""Hypothesis strategies for token lists that share prefixes in every way."""

from __future__ import annotations

from hypothesis import strategies as st

# An alphabet of three makes every kind of branching, nesting and repetition likely.
_token = st.integers(0, 2)
_short = st.lists(_token, min_size=1, max_size=7).map(tuple)


@st.composite
def _behind_shared_prompts(draw: st.DrawFn) -> list[tuple[int, ...]]:
    prompts = draw(st.lists(st.lists(_token, min_size=1, max_size=5).map(tuple), min_size=1, max_size=3))
    picks = draw(st.lists(st.tuples(st.sampled_from(prompts), st.lists(_token, max_size=4)), min_size=1, max_size=8))
    return [(*prompt, *response) for prompt, response in picks]


token_lists = st.one_of(st.lists(_short, min_size=1, max_size=8), _behind_shared_prompts())


@st.composite
def scored_token_lists(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[tuple[bool, ...]]]:
    """Token lists and, for each, which tokens are scored (never the first)."""
    lists = draw(token_lists)
    flags = [(False, *draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))) for ids in lists]
    return lists, flags
