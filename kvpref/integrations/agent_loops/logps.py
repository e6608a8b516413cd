"""`tree_logps` and `tree_forward_backward`: the engine for loops that compute their own loss over padded rows.

Shape legend: B rows of L columns; R columns of the response mask, L or fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from kvpref.engine.options import EngineOptions
from kvpref.engine.passes import response_logps
from kvpref.engine.schedules import forward_backward
from kvpref.integrations.agent_loops.rows import ResponseRows
from kvpref.losses import LossOutput, loss
from kvpref.plan.batch import Batch
from kvpref.plan.sharing import DEFAULT_MIN_SHARED_TOKENS
from kvpref.records.outputs import ResponseLogps
from kvpref.records.requests import HeadOptions


class TreeLogps(NamedTuple):
    """The result of `tree_logps`.

    Attributes:
        logps: (B, R) float32 (float64 for a float64 model), natural log: at each response token its log-prob given the
            tokens before it, 0 elsewhere.
        entropy: (B, R) in nats, the same dtype: of the distribution that each response token is drawn from, 0
            elsewhere; None if not asked for.
    """

    logps: torch.Tensor
    entropy: torch.Tensor | None


def tree_logps(
    model: nn.Module,
    rows: Mapping[str, Any],
    *,
    temperature: float = 1.0,
    entropy: bool = True,
    mode: str = "two_pass",
    backend: str = "auto",
    checkpoint: str = "none",
    min_shared_tokens: int = DEFAULT_MIN_SHARED_TOKENS,
) -> TreeLogps:
    """Log-probs and entropies of the response tokens of padded rows, in their shape, each shared prefix computed once.

    The numbers and gradients are those of each row alone, to rounding::

        logits = model(input_ids=row).logits / temperature
        logps[t] = logits[t - 1].log_softmax(-1)[row[t]]    # where response_mask[t] is 1

    Rows that begin alike (attempts at one task, or calls of one agent whose histories nest) run their common beginning
    once, whatever their order.

    Args:
        model: Attached with `kvpref.attach`; may be wrapped in PEFT, DDP or FSDP2.
        rows: Padded tensors on the model's device, by name (a dict, a BatchEncoding, a TensorDict): ``input_ids``
            (B, L) int64; ``attention_mask`` (B, L), 1 for tokens, 0 for padding left, right or on both sides;
            ``response_mask``, 1 where a log-prob is wanted, (B, L), or (B, R) for the last R columns only. A row may
            have no response token. ``position_ids`` (B, L) are not needed; if given, they must count each row's
            tokens from 0. Other names (advantages, weights, old log-probs) are ignored.
        temperature: Logits are divided by it.
        entropy: Whether entropies are computed.
        mode: As in `kvpref.response_logps`.
        backend: As in `kvpref.response_logps`.
        checkpoint: As in `kvpref.response_logps`.
        min_shared_tokens: Shared runs shorter than this are repeated.

    Returns:
        Log-probs and entropies in the shape of ``response_mask``, with gradient.

    Raises:
        InputError: If a tensor is missing or has a wrong shape, dtype or values, a row's first token or padding is a
            response token, or rows hold images; otherwise as `kvpref.response_logps`.
        UnsupportedModelError: As `kvpref.response_logps`.
    """
    head = HeadOptions(temperature=temperature, entropy=entropy)
    EngineOptions(mode=mode, backend=backend, checkpoint=checkpoint)  # refuse before reading the rows
    read = ResponseRows.read(rows, min_shared_tokens)
    found = response_logps(model, read.batch, mode=mode, backend=backend, checkpoint=checkpoint, head=head)
    return _padded(found, read)


def tree_forward_backward(
    model: nn.Module,
    rows: Mapping[str, Any],
    loss_fn: Callable[[TreeLogps], torch.Tensor | LossOutput],
    options: EngineOptions | None = None,
    *,
    temperature: float = 1.0,
    entropy: bool = True,
    min_shared_tokens: int = DEFAULT_MIN_SHARED_TOKENS,
    backward: Callable[[torch.Tensor], None] | None = None,
    **changes: Any,
) -> LossOutput:
    """Compute a loss of `tree_logps` and add its gradients to the parameters' `.grad`.

    Like ``loss_fn(tree_logps(model, rows)).backward()``, in any schedule: ``schedule="bounded"`` keeps activations of
    at most `max_tokens_per_chunk` tokens at once, however many rows there are.

    Args:
        model: As in `tree_logps`.
        rows: As in `tree_logps`.
        loss_fn: From log-probs and entropies to a scalar, or to a `kvpref.LossOutput` with metrics.
        options: As in `kvpref.forward_backward`.
        temperature: As in `tree_logps`.
        entropy: As in `tree_logps`.
        min_shared_tokens: As in `tree_logps`.
        backward: As in `kvpref.forward_backward`.
        **changes: As in `kvpref.forward_backward`.

    Returns:
        The loss and its metrics, detached.

    Raises:
        InputError: As `tree_logps` and `kvpref.forward_backward`.
        UnsupportedModelError: As `kvpref.forward_backward`.
    """
    declare = loss(temperature=temperature, entropy=entropy)
    read = ResponseRows.read(rows, min_shared_tokens)

    def of_rows(policy: ResponseLogps, reference: None, batch: Batch) -> Any:
        return loss_fn(_padded(policy, read))

    of_rows.__name__ = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    return forward_backward(model, read.batch, declare(of_rows), options, backward=backward, **changes)


def _padded(found: ResponseLogps, rows: ResponseRows) -> TreeLogps:
    return TreeLogps(rows.pad(found.token_logps), None if found.entropy is None else rows.pad(found.entropy))
