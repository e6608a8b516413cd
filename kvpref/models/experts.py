"""The load-balancing loss of a mixture of experts, where each token that runs once counts as often as it occurs.

With E experts, over all N rows of all expert layers (a token that n sequences hold stands for n rows in each layer):

    loss = E * sum_e f_e * P_e,   f_e = (rows that choose expert e) / N,   P_e = (sum of its router probabilities) / N

This is transformers' `load_balancing_loss_func` (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6) on the
sequences as ordinary training sees them. f has no gradient, so once f is known the loss is linear in the sums of
probabilities, as the bounded schedule needs.

Shape legend: M micro-batches, T rows of a pass, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from kvpref.errors import UnsupportedModelError
from kvpref.models.own_head import GivenHidden, run_own_forward

_TOP_K = "_kvpref_router_top_k"
# Names that configs use for the number of experts per token.
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "top_k_experts", "top_k")
# Sums of about ten products in two orders, the model's own in fp32.
_TOLERANCE = 1e-5


class RouterSums(NamedTuple):
    """Sums over the rows of some passes and over all expert layers, per micro-batch.

    Attributes:
        choices: (M, E) how many rows chose each expert, without gradient.
        probabilities: (M, E) sums of router probabilities, in the graph.
        num_rows: (M,) rows.
    """

    choices: torch.Tensor
    probabilities: torch.Tensor
    num_rows: torch.Tensor

    def balance_losses(self) -> torch.Tensor:
        """(M,) the load-balancing loss of each micro-batch."""
        num_rows = self.num_rows.unsqueeze(1)
        return self.choices.shape[1] * (self.choices / num_rows * (self.probabilities / num_rows)).sum(1)


class RouterTally:
    """Collects the router logits of passes as they run. Opaque to pytrees, like running passes.

    Args:
        model: An attached model.
        counts: Per pass, in the order in which they run, (M, T): how often its rows occur in each micro-batch.
    """

    def __init__(self, model: PreTrainedModel, counts: Sequence[torch.Tensor]) -> None:
        self._model = model
        self._counts = iter(counts)
        self._found: list[RouterSums] = []

    def add(self, outputs: Any) -> None:
        """Add a pass.

        Args:
            outputs: What the backbone returned; its `router_logits` are (T, E) or (B, T, E) per expert layer.

        Raises:
            UnsupportedModelError: If there are none, or the model's own loss differs.
        """
        router_logits = getattr(outputs, "router_logits", None)
        if not router_logits:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} returns no router logits, so it has no load-balancing loss; leave "
                "router_aux_loss_coef out"
            )
        counts = next(self._counts)
        layers = [logits.reshape(counts.shape[1], -1) for logits in router_logits]
        top_k = _verified_top_k(self._model, layers[0].shape[1])
        self._found.append(_sums(layers, counts, top_k))

    def sums(self) -> RouterSums:
        """The sums over all passes so far."""
        return RouterSums(*(torch.stack(each).sum(0) for each in zip(*self._found, strict=True)))


def _sums(layers: Sequence[torch.Tensor], counts: torch.Tensor, top_k: int) -> RouterSums:
    found = []
    for logits in layers:
        weights = logits.softmax(-1)
        chosen = torch.zeros_like(weights).scatter_(1, weights.topk(top_k, dim=-1).indices, 1.0)
        wide = torch.promote_types(weights.dtype, torch.float32)
        # Not under autocast: sums over thousands of rows, in fp32 as in transformers.
        with torch.autocast(logits.device.type, enabled=False):
            found.append((counts.to(wide) @ chosen.to(wide), counts.to(wide) @ weights.to(wide)))
    choices, probabilities = (torch.stack(each).sum(0) for each in zip(*found, strict=True))
    return RouterSums(choices.detach(), probabilities, counts.sum(1) * len(layers))


@torch.no_grad()
def _verified_top_k(model: PreTrainedModel, num_experts: int) -> int:
    """How many experts a token goes to; found once, by running the model's own loss on made-up router logits.

    Raises:
        UnsupportedModelError: If the model has no such loss, or no number of experts reproduces its value.
    """
    known: tuple[int, int] | None = getattr(model, _TOP_K, None)
    if known is not None and known[0] == num_experts:
        return known[1]
    counts = torch.tensor([[1, 2, 1, 3, 1]], device=model.device)
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(counts.numel(), num_experts, generator=generator).to(model.device) for _ in range(2)]
    own = _own_balance_loss(model, [logits.repeat_interleave(counts[0], dim=0) for logits in layers])
    config = model.config.get_text_config()
    candidates = {getattr(config, name, None) for name in _TOP_K_NAMES} | {_of_ffn(config)}
    for top_k in candidates:
        if isinstance(top_k, int) and 0 < top_k <= num_experts and own is not None:
            expected = _sums(layers, counts.to(torch.float32), top_k).balance_losses().item()
            if abs(own - expected) <= _TOLERANCE * abs(expected):
                setattr(model, _TOP_K, (num_experts, top_k))
                return top_k
    raise UnsupportedModelError(
        f"{type(model).__name__} has no load-balancing loss that kvpref knows; leave router_aux_loss_coef out"
    )


def _of_ffn(config: Any) -> int | None:
    """The number in DBRX's nested config."""
    return getattr(getattr(config, "ffn_config", None), "moe_top_k", None)


def _own_balance_loss(model: PreTrainedModel, router_logits: list[torch.Tensor]) -> float | None:
    """The model's own loss for router logits (rows, E) per layer; None if it has none."""
    num_rows = router_logits[0].shape[0]
    hidden = torch.zeros(1, num_rows, model.config.get_text_config().hidden_size)
    given = GivenHidden(last_hidden_state=hidden.to(device=model.device, dtype=model.dtype))
    given.router_logits = tuple(router_logits)
    input_ids = torch.zeros(1, num_rows, dtype=torch.int64, device=model.device)
    try:
        outputs = run_own_forward(
            model, given, input_ids=input_ids, attention_mask=torch.ones_like(input_ids), output_router_logits=True
        )
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be asked for its load-balancing loss: {type(error).__name__}: {error}"
        ) from error
    loss = getattr(outputs, "aux_loss", None)
    return float(loss) if isinstance(loss, torch.Tensor) else None
