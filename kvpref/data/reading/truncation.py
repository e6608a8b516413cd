"""Cutting prompts at their start and responses at their end."""

from __future__ import annotations

from dataclasses import dataclass

from kvpref.data.reading.messages import RowError
from kvpref.data.reading.tokenization import TokenizedSequence


@dataclass(frozen=True)
class TruncatedRow:
    """The sequences of one row after truncation, and what was cut.

    Args:
        sequences: The sequences in the order of the responses.
        prompt_tokens_cut: Tokens cut from the prompt that the sequences share.
        num_truncated_responses: How many responses lost tokens.
        response_tokens_cut: How many tokens they lost in total, EOS included.
    """

    sequences: list[TokenizedSequence]
    prompt_tokens_cut: int
    num_truncated_responses: int
    response_tokens_cut: int


def truncate_row(
    sequences: list[TokenizedSequence],
    *,
    max_prompt_tokens: int | None,
    max_response_tokens: int | None,
    bos_token_id: int | None,
) -> TruncatedRow:
    """Keep the end of the prompt (after BOS, if it starts with one) and the start of each response.

    Every sequence keeps at most `max_prompt_tokens` prompt tokens, BOS included, and all lose the same tokens, so
    that they still share the rest.
    """
    cuts = prompt_cuts([sequence.num_prompt_tokens for sequence in sequences], max_prompt_tokens)
    kept, response_cuts = [], []
    for sequence, cut in zip(sequences, cuts, strict=True):
        front = int(bos_token_id is not None and sequence.input_ids[0] == bos_token_id)
        prompt = sequence.input_ids[:front] + sequence.input_ids[front + cut : sequence.num_prompt_tokens]
        response = sequence.input_ids[sequence.num_prompt_tokens :]
        response_cuts.append(max(0, len(response) - max_response_tokens) if max_response_tokens is not None else 0)
        response = response[: len(response) - response_cuts[-1]]
        unscored = tuple((start, min(end, len(response))) for start, end in sequence.unscored if start < len(response))
        kept.append(TokenizedSequence(prompt + response, len(prompt), unscored))
    return TruncatedRow(kept, max(cuts), sum(cut > 0 for cut in response_cuts), sum(response_cuts))


def prompt_cuts(lengths: list[int], max_prompt_tokens: int | None) -> list[int]:
    """How many tokens each prompt of a row loses: the same number for all, if that leaves each at least one token.

    Args:
        lengths: Lengths of the prompts.
        max_prompt_tokens: Most tokens to keep; None for any number.
    """
    if max_prompt_tokens is None or max(lengths) <= max_prompt_tokens:
        return [0] * len(lengths)
    cut = max(lengths) - max_prompt_tokens
    if cut < min(lengths):
        return [cut] * len(lengths)
    # The prompts differ in length by more than may be kept: cut equally, one would lose all its tokens.
    return [max(0, length - max_prompt_tokens) for length in lengths]


def check_prompt_fits(sequences: list[TokenizedSequence], max_prompt_tokens: int | None) -> None:
    """Refuse to cut a prompt with images.

    Prompts lose their beginning, which is where images usually are, and only the processor knows which tokens around an
    image belong to it.

    Raises:
        RowError: If the prompt is too long.
    """
    longest = max(sequence.num_prompt_tokens for sequence in sequences)
    if max_prompt_tokens is not None and longest > max_prompt_tokens:
        raise RowError(
            f"the prompt has {longest} tokens, more than max_prompt_tokens={max_prompt_tokens}, and prompts with "
            "images are not cut; raise the limit, or make the images smaller (max_image_pixels)"
        )
