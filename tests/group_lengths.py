"""Counts of made-up groups, for planning tests."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from kvpref.data import GroupLengths


def make_lengths(responses: list[int], prompt: int = 0) -> GroupLengths:
    """Counts of a prompt with responses of so many tokens, all scored, that share nothing but the prompt."""
    lengths = [prompt + response for response in responses]
    return GroupLengths(
        unique_tokens=prompt + sum(responses),
        total_tokens=sum(lengths),
        max_sequence_tokens=max(lengths),
        num_sequences=len(responses),
        unique_pairs=sum(range(1, prompt + 1)) + sum(sum(range(prompt + 1, length + 1)) for length in lengths),
        total_pairs=sum(sum(range(1, length + 1)) for length in lengths),
        unique_scored=sum(responses),
        total_scored=sum(responses),
        beginning_tokens=prompt if len(responses) > 1 else 0,
    )


def random_pairs(num: int, seed: int = 0) -> list[GroupLengths]:
    """Pairs with prompts of up to 200 tokens and responses of up to 60."""
    generator = random.Random(seed)
    return [
        make_lengths([generator.randint(1, 60), generator.randint(1, 60)], generator.randint(1, 200))
        for _ in range(num)
    ]


group_lengths = st.builds(make_lengths, st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 40))
