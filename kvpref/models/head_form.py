"""What lies between a model's final hidden states and its logits: guessed from the config, proved by comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from transformers import PreTrainedModel

from kvpref.errors import UnsupportedModelError
from kvpref.models.output_layer import head_module, is_reward_model
from kvpref.models.own_head import own_outputs

_NUM_PROBES = 3
# A softcap of 30 changes logits around 1 by less than 16-bit rounding, and those around 1000 to 30.
_PROBED_SIZES = (1.0, 30.0, 1000.0)
# Two evaluations of one linear layer, in the model's own dtype, differ by rounding only.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
_TOLERANCE_16_BIT = 2e-2
_LARGEST_FACTOR = 1e4  # within fp16's range, with room for the largest of a few thousand normal numbers
_FORM = "_kvpref_head_form"

# Factors on the logits, by where a model keeps them. What is right for one model is wrong for another (Granite
# divides by logits_scaling, HyperCLOVA X multiplies), so all are tried.
_SCALES: dict[str, Callable[[Any], float]] = {
    "logits_scaling": lambda value: 1.0 / value,
    "logits_scaling, times": lambda value: float(value),
    "logit_scale": lambda value: float(value),
    "lm_head_multiplier": lambda value: float(value),
    "logits_mup_width_multiplier": lambda value: 1.0 / value,
}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, kw_only=True)
class HeadForm:
    """How hidden states become logits."""

    fused: bool
    """Whether the linear layer and what follows are fully known; if not, the model's own forward makes the logits."""

    logit_scale: float = 1.0
    """Factor on the linear layer's output."""

    softcap: float | None = None
    """Bound on the logits after that: ``softcap * tanh(logits / softcap)``; None for none."""

    def logits(self, linear: torch.Tensor) -> torch.Tensor:
        """The logits for the linear layer's output."""
        logits = linear * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


OWN_FORWARD = HeadForm(fused=False)


def head_form(model: PreTrainedModel) -> HeadForm:
    """The current form: what `verify_head` found, unless the head has been replaced since."""
    form: HeadForm = getattr(model, _FORM)
    return form if isinstance(head_module(model), nn.Linear) else OWN_FORWARD


@torch.no_grad()
def verify_head(model: PreTrainedModel) -> None:
    """Run the model's own forward on made-up hidden states, and keep the form that gives the same logits.

    The layers are skipped, so this costs a few rows of the LM head, whatever the size of the model.

    Raises:
        UnsupportedModelError: If the head reads more than the hidden state of each token.
    """
    head = head_module(model)
    weight = getattr(head, "weight", None)
    candidates = list(_candidates(model)) if isinstance(head, nn.Linear) else []
    if isinstance(weight, torch.Tensor) and (weight.is_meta or isinstance(weight, FakeTensor)):
        # Nothing to compare; the weights will be checked when the materialised model is attached.
        setattr(model, _FORM, candidates[0] if candidates else OWN_FORWARD)
        return
    probes = _probes(model, head)
    try:
        found = [own_outputs(model, hidden) for hidden in probes]
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot make logits from given hidden states: {type(error).__name__}: {error}"
        ) from error
    for form in candidates:
        if all(map(_agree, found, (_expected(model, head, form, hidden) for hidden in probes))):
            setattr(model, _FORM, form)
            return
    _check_reads_rows_only(model, probes, found)
    _check_head_takes_part(model, probes[0])
    setattr(model, _FORM, OWN_FORWARD)


def _candidates(model: PreTrainedModel) -> Iterator[HeadForm]:
    """Forms suggested by names in the config, likeliest first."""
    if is_reward_model(model):
        yield HeadForm(fused=True)
        return
    config = model.config.get_text_config()
    scales = [factor(value) for key, factor in _SCALES.items() if (value := _number(config, key.partition(",")[0]))]
    softcaps = [value for key in _SOFTCAPS if (value := _number(config, key))]
    for softcap in (*softcaps, None):
        for scale in (*(scale for scale in scales if scale != 1), 1.0):
            yield HeadForm(fused=True, logit_scale=scale, softcap=softcap)


def _number(config: Any, key: str) -> float | None:
    value = getattr(config, key, None)
    return value if isinstance(value, int | float) else None


def _probes(model: PreTrainedModel, head: Any) -> list[torch.Tensor]:
    """Hidden states (1, n, hidden_size) whose logits are about 1, 30 and 1000."""
    weight: Any = getattr(head, "weight", None)
    # Not the layer's in_features: PEFT's copy of a tied LM head has them swapped.
    is_matrix = isinstance(head, nn.Linear) and weight.ndim == 2 and weight.is_floating_point()
    size = weight.shape[1] if is_matrix else model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _NUM_PROBES, size, generator=generator)
    hidden = hidden.to(weight) if is_matrix else hidden.to(device=model.device, dtype=model.dtype)
    largest = head(hidden).abs().max().float().item() if is_matrix else 1.0
    return [hidden * min(wanted / (largest or 1.0), _LARGEST_FACTOR) for wanted in _PROBED_SIZES]


def _expected(model: PreTrainedModel, head: nn.Linear, form: HeadForm, hidden: torch.Tensor) -> torch.Tensor:
    outputs: torch.Tensor = head(hidden)
    # A reward model reads its last token.
    return outputs[:, -1] if is_reward_model(model) else form.logits(outputs)


def _check_reads_rows_only(model: PreTrainedModel, probes: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    """Check that the forward's result for a row depends neither on its token nor on other rows."""
    is_reward = is_reward_model(model)
    for hidden, outputs in zip(probes, found, strict=True):
        last_alone = own_outputs(model, hidden[:, -1:])
        last = outputs if is_reward else outputs[:, -1:]
        another_token = own_outputs(model, hidden, token=2)
        if not (_agree(last_alone, last) and _agree(another_token, outputs)):
            raise UnsupportedModelError(
                f"{type(model).__name__} makes its logits from more than the hidden state of each token (other tokens "
                "or their ids), which kvpref does not follow"
            )


def _check_head_takes_part(model: PreTrainedModel, hidden: torch.Tensor) -> None:
    """Check that the logits come from the model's head and do not bypass it."""
    head = head_module(model)
    calls: list[int] = []
    hook = None if head is None else head.register_forward_hook(lambda *_: calls.append(1))
    try:
        logits = own_outputs(model, hidden)
    finally:
        if hook is not None:
            hook.remove()
    if not calls or logits.shape[:-1] != (hidden.shape[:1] if is_reward_model(model) else hidden.shape[:-1]):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not make its logits with its output layer ({type(head).__name__}) from the "
            "last hidden states, so kvpref cannot tell where they come from"
        )


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    tolerance = max(_TOLERANCE.get(tensor.dtype, _TOLERANCE_16_BIT) for tensor in (found, expected))
    found, expected = found.double(), expected.double()
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-30))
