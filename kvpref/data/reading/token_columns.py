"""Columns with an entry per token, which must match the tokens that they were made for."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

from kvpref.data.reading.messages import RowError
from kvpref.data.reading.rows import PreferenceRow
from kvpref.data.reading.tokenization import TokenizedSequence


def check_token_columns(
    row: PreferenceRow, whole: AbstractSequence[TokenizedSequence], kept: AbstractSequence[TokenizedSequence]
) -> None:
    """Refuse a column whose entries would fall on tokens other than those they were made for.

    Losses read one number per scored token. If a response is cut, or some of its tokens are not scored, only users know
    which entries to drop.

    Raises:
        RowError: Naming the column.
    """
    for name, value in row.columns.items():
        if not isinstance(value, list) or len(value) != len(whole):
            continue
        for index, (entry, before, after) in enumerate(zip(value, whole, kept, strict=True)):
            if not isinstance(entry, list):
                continue
            num_tokens = len(before.input_ids) - before.num_prompt_tokens
            num_before, num_after = (sum(item.scored) for item in (before, after))
            if num_after < num_before == len(entry):
                raise RowError(
                    f"column `{name}` has an entry for each of the {num_before} tokens of response {index}, which is "
                    f"cut to {num_after}; raise max_response_tokens, or shorten the response and its column in the data"
                )
            if num_before < num_tokens == len(entry):
                raise RowError(
                    f"column `{name}` has an entry for each of the {num_tokens} tokens of response {index}, of which "
                    f"{num_before} are scored; leave out the entries of what tools and users say inside it"
                )
