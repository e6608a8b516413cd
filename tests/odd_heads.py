"""Llamas whose forwards do something of their own between the layers and the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_models import tiny_model, tiny_reward_model
from transformers import PreTrainedModel

Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits, input_ids) -> logits."""


def with_logits(
    change: Change, dtype: torch.dtype = torch.float64, *, rewards: bool = False, family: str = "llama"
) -> PreTrainedModel:
    """A tiny model whose forward ends in `change`; its class keeps the name of a class of transformers."""
    model = (tiny_reward_model if rewards else tiny_model)(family, dtype)
    plain: Any = type(model)

    def forward(self: Any, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        output = plain.forward(self, input_ids, **kwargs)
        output.logits = change(output.logits, input_ids)  # type: ignore[arg-type]
        return output

    model.__class__ = type(plain.__name__, (plain,), {"forward": forward, "__module__": plain.__module__})
    return model


def softcapped(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """A cap that no name in the config speaks of."""
    return 2 * torch.tanh(logits / 2)


def normed(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(logits, logits.shape[-1:]) * 3 + 0.5 * torch.tanh(logits)


def masked(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Every third token can never come, except those that tests ask for."""
    index = torch.arange(logits.shape[-1])
    return logits.masked_fill((index % 3 == 2) & (index > 96), float("-inf"))


def padded_vocabulary(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    return logits[..., :-4]


def biased_by_token(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    return logits + input_ids.unsqueeze(-1)


def mixed_rows(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(1, keepdim=True)
