"""Families in which tokens of one image, or of the whole prompt, see later tokens of the same span."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import causal_mask_function, or_masks

from kvpref.errors import UnsupportedModelError
from kvpref.models.masks import MaskFunction, is_causal
from kvpref.plan.passes import PassPlan
from kvpref.prefix.rules import Rule


@dataclass(frozen=True, kw_only=True)
class BothWays:
    """Which tokens of a model see one another in both directions."""

    spans: str = "none"
    """Which runs of tokens see both ways; one of `kvpref.records.requests.SPANS`."""

    full_layers: bool = True
    """Whether they also do so in layers that see all earlier tokens, not only in those with a window."""

    whole_spans: bool = False
    """Whether the window of a layer ends where their span begins, and not inside it."""

    masks: bool = True
    """Whether masks express it. If not, a prompt's first tokens see its images differently: it is shared as a whole."""

    setting: tuple[str, str] | None = None
    """A setting of the language model's config and the value it must have for tokens to see both ways."""

    def applied(self, rule: Rule, mask_function: MaskFunction) -> Rule:
        """The rule of layers whose own mask function, unaware of images, follows `rule`.

        Raises:
            UnsupportedModelError: If spans cannot be expressed under such a rule.
        """
        # The rule does not tell: a window longer than the batch reads as causal.
        return self.with_spans(rule, is_full=is_causal(mask_function))

    def with_spans(self, rule: Rule, *, is_full: bool) -> Rule:
        """Like `applied`, given whether the layers see all earlier tokens however long sequences are."""
        if self.spans == "none" or not self.masks or (is_full and not self.full_layers):
            return rule
        if rule.kind not in ("causal", "window"):
            raise UnsupportedModelError(
                f"layers in which images see both ways besides a {rule.kind} mask; use mode 'padded' for this model"
            )
        return replace(rule, bidirectional=True, whole_spans=self.whole_spans and rule.kind == "window")


_FAMILIES = {
    "gemma3": BothWays(spans="images"),
    "gemma4": BothWays(spans="images", full_layers=False, setting=("use_bidirectional_attention", "vision")),
    "gemma4_unified": BothWays(spans="images", whole_spans=True, setting=("use_bidirectional_attention", "vision")),
    "mllama": BothWays(spans="prompts", masks=False),
    "paligemma": BothWays(spans="prompts", whole_spans=True),
    "shieldgemma2": BothWays(spans="images"),
}

NOWHERE = BothWays()


def both_ways_of(config: Any) -> BothWays:
    """Which tokens see one another in both directions, in models of a configuration."""
    found = _FAMILIES.get(config.model_type, NOWHERE)
    if found.setting is None:
        return found
    name, value = found.setting
    return found if getattr(config.get_text_config(), name, None) == value else NOWHERE


@dataclass(frozen=True, kw_only=True, eq=False)
class _PaddedSpans:
    """The spans of a pass in mode ``padded``, where the model's own masks are unaware of images."""

    both_ways: BothWays
    numbers: torch.Tensor
    """(B, T) int64, the span of its row that a token belongs to; -1 for none."""

    def mask(self, model_mask: MaskFunction) -> MaskFunction:
        """The layers' mask, extended by what their spans see."""
        if not self.both_ways.full_layers and is_causal(model_mask):
            return model_mask

        def inside_spans(
            batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
        ) -> torch.Tensor:
            own = self.numbers[batch, query]
            seen = (own == self.numbers[batch, key]) & (own >= 0)
            return seen if self.both_ways.whole_spans else seen & (key > query)

        joined: MaskFunction = or_masks(model_mask, inside_spans)
        return joined


_padded: ContextVar[_PaddedSpans | None] = ContextVar("kvpref_padded_spans", default=None)


@contextmanager
def padded_spans(model: PreTrainedModel, item: PassPlan) -> Iterator[None]:
    """Let the spans of rows in mode ``padded`` see both ways while they run."""
    if not any(item.spans_of_rows) or not both_ways_of(model.config).masks:
        yield
        return
    numbers = torch.full(item.input_ids.shape, -1)
    for row, runs in enumerate(item.spans_of_rows):
        for number, (first, stop) in enumerate(runs):
            numbers[row, first:stop] = number
    spans = _PaddedSpans(both_ways=both_ways_of(model.config), numbers=numbers.to(item.input_ids.device))
    token = _padded.set(spans)
    try:
        yield
    finally:
        _padded.reset(token)


def padded_mask_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments for transformers' own mask functions if rows have spans."""
    spans = _padded.get()
    if spans is None:
        return arguments
    mask = spans.mask(arguments.get("mask_function", causal_mask_function))
    return {**arguments, "mask_function": mask, "allow_is_causal_skip": False}
