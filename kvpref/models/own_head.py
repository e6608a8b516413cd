"""A model's own head: its forward without its layers, run on given hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from kvpref.errors import InputError
from kvpref.models.output_layer import head_module
from kvpref.records.requests import HeadOptions

# Bytes of one piece of logits; a few tensors of this size exist at once.
_PIECE_BYTES = {"cpu": 64 * 2**20}
_DEFAULT_PIECE_BYTES = 256 * 2**20


class GivenHidden(BaseModelOutputWithPast):
    """A backbone output with given final hidden states; any other field that a forward may read is None.

    Models read fields of their own output classes (`router_logits`, `image_hidden_states`), so every name exists.
    """

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):  # copying and pickling look these up and would take None for an answer
            raise AttributeError(name)


@contextmanager
def given_outputs(model: PreTrainedModel, given: GivenHidden) -> Iterator[None]:
    """Let the model's backbone return `given`, whatever it is called with.

    Some forwards call a part of the backbone (`model.decoder`), so parts that are models themselves do the same,
    except a part that holds the head: a language model inside a multimodal one.
    """
    head = head_module(model)
    inside = [module for module in model.base_model.modules() if isinstance(module, PreTrainedModel)]
    backbones = [
        module for module in inside if all(part is not head and part is not model for part in module.modules())
    ]
    saved = [module.__dict__.get("forward") for module in backbones]
    for module in backbones:
        module.forward = lambda *args, **kwargs: given
    try:
        yield
    finally:
        for module, forward in zip(backbones, saved, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def own_outputs(model: PreTrainedModel, hidden: torch.Tensor, token: int | None = None) -> torch.Tensor:
    """The model's outputs for final hidden states, in the graph: logits, or a reward model's outputs for its last row.

    Args:
        model: Attached or not.
        hidden: (B, T, hidden_size).
        token: The token id passed to the model for every row; None for any id but padding.

    Returns:
        (B, T, vocab_size), or (B, num_labels) for a reward model.
    """
    if token is None:
        token = 1 if _pad_token_id(model) == 0 else 0  # a reward model skips padding
    input_ids = torch.full(hidden.shape[:2], token, dtype=torch.int64, device=hidden.device)
    logits: torch.Tensor = run_own_forward(model, GivenHidden(last_hidden_state=hidden), input_ids=input_ids).logits
    return logits


def run_own_forward(model: PreTrainedModel, given: GivenHidden, **inputs: Any) -> Any:
    """The model's own forward, with its backbone returning `given`."""
    with given_outputs(model, given):
        # Not a call of the module: inside a pass, the wrappers' hooks have already run.
        return model.forward(use_cache=False, return_dict=True, **inputs)


def own_rewards(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The rewards of U rows (U, hidden_size), each read as the last token of a sequence: (U,)."""
    rows = hidden.unsqueeze(1)
    if _pad_token_id(model) is None:  # then transformers takes one sequence at a time
        return torch.cat([own_outputs(model, row).flatten() for row in rows.split(1)])
    return own_outputs(model, rows).flatten()


def own_statistics(
    model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor, options: HeadOptions
) -> dict[str, torch.Tensor]:
    """The results of `head_outputs`, from logits made by the model's own forward.

    Only a few rows' logits exist at once; the backward pass computes them again.

    Args:
        model: An attached model.
        hidden: (U, hidden_size).
        targets: (U,) int64.
        options: What to compute.

    Raises:
        InputError: If `logit_ids` lie outside the vocabulary.
    """
    piece_bytes = _PIECE_BYTES.get(hidden.device.type, _DEFAULT_PIECE_BYTES)
    vocab_size = model.config.get_text_config().vocab_size
    rows = max(1, piece_bytes // (vocab_size * torch.float32.itemsize))
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    if torch.is_grad_enabled():
        found = [
            checkpoint(_piece, model, *piece, options, use_reentrant=False, preserve_rng_state=False)
            for piece in pieces
        ]
    else:
        found = [_piece(model, *piece, options) for piece in pieces]
    return {name: torch.cat([piece[name] for piece in found]) for name in found[0]}


def own_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The logits of U rows, (U, hidden_size) -> (U, vocab_size), at least in fp32."""
    logits = own_outputs(model, hidden.unsqueeze(0)).squeeze(0)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _piece(
    model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor, options: HeadOptions
) -> dict[str, torch.Tensor]:
    logits = own_logits(model, hidden) / options.temperature
    with torch.autocast(hidden.device.type, enabled=False):
        logps = logits.log_softmax(-1)
        vocab_size = logits.shape[-1]
        # A target that has no logit gets NaN, not a plausible number.
        target_logps = logps.gather(1, targets.clamp(0, vocab_size - 1).unsqueeze(1)).squeeze(1)
        found = {"token_logps": target_logps.where(targets < vocab_size, float("nan"))}
        if options.entropy:
            # 0 for an impossible token, whose logit is -inf.
            found["entropy"] = -(logps.exp() * logps.where(logps.isfinite(), 0.0)).sum(-1)
        if options.collision:
            found["collision"] = (2 * logps.detach()).logsumexp(-1)
        if options.mean_logits:
            found["mean_logits"] = logits.detach().mean(-1)
        if options.logit_ids:
            check_logit_ids(options.logit_ids, vocab_size)
            found["logits"] = logits[:, list(options.logit_ids)]
    return found


def _pad_token_id(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "pad_token_id", None)


def check_logit_ids(ids: tuple[int, ...], vocab_size: int) -> None:
    """Raise InputError for ids outside the vocabulary."""
    if not all(0 <= index < vocab_size for index in ids):
        raise InputError(f"logit_ids must lie in [0, {vocab_size}), the vocabulary; got {ids}")
