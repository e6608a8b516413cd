"""Groups for models with recurrent layers: prompts of 13, 7 and 3 tokens, responses of 1 to 11, up to three levels."""

from __future__ import annotations

from sample_groups import tokens

from kvpref import Group, Sequence


def _group(prompt: list[int], *responses: list[int]) -> Group:
    return Group([Sequence.from_prompt_and_response(prompt, response) for response in responses])


def hybrid_groups() -> list[Group]:
    """A prompt under which two others go on, one of them by a single token; and prompts of their own."""
    story = tokens(13, 200)
    return [
        _group([*story, *tokens(7, 201)], tokens(1, 202), tokens(11, 203), tokens(4, 204)),
        _group([*story, *tokens(1, 205)], tokens(5, 206), tokens(2, 207)),
        _group(tokens(7, 208), tokens(3, 209), tokens(9, 210)),
        _group(tokens(3, 211), tokens(6, 212), tokens(1, 213)),
    ]
