"""Padded batches, as data collators make them, whose rows share prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sample_groups import tokens
from torch import nn

import kvpref
from kvpref.integrations.shared_prefix.switch import SharedPrefix

IGNORED = -100


def sharing_rows() -> list[list[int]]:
    """Two prompts with three and two responses, one response twice, and a row that shares nothing."""
    first, second = tokens(20, 1), tokens(12, 2)
    return [
        first + tokens(5, 3),
        first + tokens(9, 4),
        second + tokens(3, 5),
        second + tokens(3, 5),
        first + tokens(1, 6),
        tokens(7, 7),
    ]


def one_prompt(num_rows: int = 4, prompt_tokens: int = 40) -> list[list[int]]:
    """Rows that answer one prompt."""
    prompt = tokens(prompt_tokens, 10)
    return [prompt + tokens(3 + index, 11 + index) for index in range(num_rows)]


def unlike_rows() -> list[list[int]]:
    """Rows whose first tokens differ."""
    return [[3 + index, *tokens(5 + index, 20 + index)] for index in range(4)]


def padded(rows: Sequence[Sequence[int]], side: str = "right", extra: int = 1) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, (B, L) int64: padding 0, and labels that count all tokens but the first.

    Args:
        rows: Token ids of each row.
        side: Where padding stands.
        extra: Columns of padding in the longest row.
    """
    width = max(map(len, rows)) + extra
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for index, row in enumerate(rows):
        start = 0 if side == "right" else width - len(row)
        own = slice(start, start + len(row))
        input_ids[index, own] = torch.tensor(row)
        attention_mask[index, own] = 1
        labels[index, own] = input_ids[index, own]
        labels[index, start] = IGNORED
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def switch_on(model: nn.Module, **options: Any) -> SharedPrefix:
    """`kvpref.shared_prefix`, with bars low enough for tiny batches."""
    return kvpref.shared_prefix(model, **{"min_shared_tokens": 1, "min_saved_tokens": 1, **options})
