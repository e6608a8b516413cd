"""All groups of a batch in one row, prompt|chosen|rejected, under one block-sparse mask; needs only the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from kvpref.records.groups import Group

PROMPT = 0


class OneRow:
    """The pairs of a batch in one row of T tokens, S of them scored.

    Attributes:
        input_ids, position_ids: (1, T) int64; positions of a response continue from its prompt.
        document, part: (T,) int64, the pair of each token, and whether it is the prompt's (0) or which response's.
        predictors, targets: (S,) int64, rows that predict scored tokens, and those tokens.
        response_lengths: (num_responses,) int64.
    """

    def __init__(self, groups: Sequence[Group], device: str) -> None:
        ids: list[int] = []
        positions: list[int] = []
        documents: list[int] = []
        parts: list[int] = []
        predictors: list[int] = []
        targets: list[int] = []
        lengths: list[int] = []
        for document, (prompt, responses) in enumerate(map(split_pair, groups)):
            last_of_prompt = len(ids) + len(prompt) - 1
            for part, tokens in enumerate((prompt, *responses)):
                if part != PROMPT:
                    predictors += [last_of_prompt, *range(len(ids), len(ids) + len(tokens) - 1)]
                    targets += tokens
                    lengths.append(len(tokens))
                first = 0 if part == PROMPT else len(prompt)
                positions += range(first, first + len(tokens))
                documents += [document] * len(tokens)
                parts += [part] * len(tokens)
                ids += tokens
        self.input_ids = torch.tensor([ids], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.document = torch.tensor(documents, device=device)
        self.part = torch.tensor(parts, device=device)
        self.predictors = torch.tensor(predictors, device=device)
        self.targets = torch.tensor(targets, device=device)
        self.response_lengths = torch.tensor(lengths, device=device)

    def block_mask(self) -> BlockMask:
        """A token sees its own part and its prompt, up to itself."""

        def visible(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            same_document = self.document[query] == self.document[key]
            same_part = self.part[query] == self.part[key]
            return (query >= key) & same_document & (same_part | (self.part[key] == PROMPT))

        num_tokens = self.input_ids.numel()
        return create_block_mask(visible, None, None, num_tokens, num_tokens, device=self.input_ids.device.type)


def split_pair(group: Group) -> tuple[list[int], list[list[int]]]:
    """Prompt tokens and each response's tokens of a group whose sequences share the prompt."""
    first = group.sequences[0]
    num_prompt = first.scored.index(True)
    prompt = list(first.input_ids[:num_prompt])
    return prompt, [list(sequence.input_ids[num_prompt:]) for sequence in group.sequences]
