"""The forwards that TRL's trainers call, through kvpref's engine.

Shape legend: B rows of L columns; S scored tokens over all rows; K hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from trl.trainer.utils import FusedCausalLMOutput

from kvpref.engine.options import EngineOptions
from kvpref.engine.passes import response_rewards, run_with_routers
from kvpref.errors import InputError
from kvpref.integrations.trl.padded import PaddedRows, unscored_rows
from kvpref.models.attach import Program, attach
from kvpref.models.head import most_likely_tokens
from kvpref.models.vision.padded_call import image_arguments, pixel_inputs
from kvpref.models.vision.splitting import split_images
from kvpref.records.outputs import ResponseLogps
from kvpref.records.requests import HeadOptions

_ADD_HEAD = "add_fused_lm_head"
_REWARD_FLAG = "kvpref_rewards"

# Largest rounding of log-probs and entropies; closer to the bound than this, the logits decide.
_BOUND_SLACK = 1e-3

Forward = Callable[..., Any]


@contextmanager
def replaced_heads(trainer_module: ModuleType, mode: str, add: Callable[..., None]) -> Iterator[None]:
    """Make a trainer built inside give its models kvpref's forward in place of TRL's fused head.

    TRL looks `add_fused_lm_head` up in the trainer's module and calls it on policy and reference, before accelerate
    wraps them and before reference log-probs are computed. Not for threads that build trainers at the same time.

    Args:
        trainer_module: The module of the trainer's class.
        mode: As in `kvpref.response_logps`.
        add: `add_shared_prompt_head`, or a function with its arguments.

    Raises:
        RuntimeError: If the trainer was built without asking for a fused head.
    """
    original = getattr(trainer_module, _ADD_HEAD)
    served: list[PreTrainedModel] = []

    def add_head(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        add(model, *args, mode=mode, **kwargs)
        served.append(model)

    setattr(trainer_module, _ADD_HEAD, add_head)
    try:
        yield
    finally:
        setattr(trainer_module, _ADD_HEAD, original)
    if not served:
        raise RuntimeError("this release of TRL gives its models no fused LM head, which kvpref replaces; use trl 1.16")


def add_shared_prompt_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    mode: str,
) -> None:
    """kvpref's version of TRL's `add_fused_lm_head`, for ``model(..., labels=labels, fused_lm_head=True)``.

    Args:
        model: The Hugging Face model, inside PEFT's wrapper if there is one. It is attached.
        temperature: The logits are divided by it.
        cast_lm_head_to_fp32: Must be False.
        outputs: Fields of TRL's `FusedCausalLMOutput`.
        mode: As in `kvpref.response_logps`.

    Raises:
        UnsupportedModelError: If the model would not be computed exactly.
        InputError: If TRL asks for a field that kvpref does not compute.
    """
    unknown = sorted(set(outputs) - {"log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"})
    if unknown or cast_lm_head_to_fp32:
        raise InputError(f"kvpref does not compute {', '.join(unknown) or 'an LM head cast to fp32'}")
    head = HeadOptions(
        temperature=temperature,
        entropy="entropy" in outputs,
        collision="log_sum_sq_probs" in outputs,
        mean_logits="mean_logits" in outputs,
        hidden="is_top1" in outputs,
    )
    serve(model, "fused_lm_head", functools.partial(_fused_output, mode=mode, head=head))


def add_shared_prompt_rewards(model: PreTrainedModel, *, mode: str) -> None:
    """Let ``model(..., kvpref_rewards=True)`` of a one-label sequence classifier compute rewards with kvpref.

    Raises:
        UnsupportedModelError: If the model would not be computed exactly.
    """
    serve(model, _REWARD_FLAG, functools.partial(_classifier_output, mode=mode))


def asking_for_rewards(inputs: dict[str, Any]) -> dict[str, Any]:
    """A classifier's inputs, plus the flag that makes its forward run kvpref."""
    return {**inputs, _REWARD_FLAG: True}


def serve(model: PreTrainedModel, flag: str, served: Forward) -> None:
    """Send calls with `flag` to `served`; all others go to the model's previous forward."""
    original = model.forward

    # The signature stays the class's own: `generate` checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return served(self, *args, **kwargs) if kwargs.pop(flag, False) else original(*args, **kwargs)

    model.forward = MethodType(forward, model)
    # Afterwards, so that programs find the engine's forward first.
    attach(model)


def _fused_output(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
    *,
    mode: str,
    head: HeadOptions,
    **others: Any,
) -> FusedCausalLMOutput:
    config = model.config.get_text_config()
    asks_for_routers = others.pop("output_router_logits", None)
    if asks_for_routers is None:
        asks_for_routers = getattr(config, "output_router_logits", False)
    about_images = {name: others.pop(name, None) for name in image_arguments(model)}
    refuse_inputs(others)
    pixels = pixel_inputs(model, about_images, input_ids, attention_mask)
    place_images = functools.partial(split_images, model, inputs=pixels) if pixels else None
    rows = PaddedRows.from_labels(input_ids, attention_mask, labels, position_ids, place_images)
    # The caller multiplies the result; the coefficient only requests it.
    options = EngineOptions(mode=mode, router_aux_loss_coef=1.0 if asks_for_routers else None)
    logps, aux_loss = run_with_routers(Inside(model), rows.batch, options, "tokens", head=head)
    assert isinstance(logps, ResponseLogps)
    count = rows.scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    is_top1 = _is_top1(model, logps, rows.targets) if head.hidden else None
    loss = -logps.token_logps.sum() / count
    if aux_loss is not None:
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=rows.pad(logps.token_logps),
        entropy=rows.pad(logps.entropy),
        log_sum_sq_probs=rows.pad(logps.collision),
        mean_logits=rows.pad(logps.mean_logits),
        is_top1=rows.pad(is_top1),
        label_mask=rows.scored,
        aux_loss=aux_loss,
    )


def _classifier_output(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    margin: torch.Tensor | None = None,
    *,
    mode: str,
    **others: Any,
) -> SequenceClassifierOutputWithPast:
    # TRL passes the whole batch to the model, including margins.
    refuse_inputs(others)
    batch = unscored_rows(input_ids, attention_mask)
    rewards = response_rewards(Inside(model), batch, mode=mode).rewards
    return SequenceClassifierOutputWithPast(logits=rewards.unsqueeze(1))


def refuse_inputs(others: dict[str, Any]) -> None:
    """Refuse other arguments, except None, False and how outputs are wrapped, which TRL and PEFT pass."""
    unknown = [
        name for name, value in others.items() if value is not None and value is not False and name != "return_dict"
    ]
    if unknown:
        raise InputError(
            f"kvpref cannot pass {', '.join(unknown)} to the model: rows are rearranged, so only input_ids, "
            "attention_mask, position_ids, labels and pixel inputs of families that it knows are understood"
        )


class Inside(nn.Module):
    """A model inside its own forward, so that programs run at once.

    Calling the model again would enter the wrappers of its forward twice; accelerate's autocast, entered twice, would
    stay on permanently.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.module = model

    def forward(self, kvpref_program: Program[Any]) -> Any:
        return kvpref_program(self.module)


@torch.no_grad()
def _is_top1(model: PreTrainedModel, logps: ResponseLogps, targets: torch.Tensor) -> torch.Tensor:
    """Whether each scored token is the most likely one, (S,) bool.

    The largest probability of a distribution is at least exp(-entropy). So a token above one half is the most likely,
    one below exp(-entropy) is not, and only tokens in between need their logits.
    """
    assert logps.entropy is not None
    assert logps.hidden is not None
    is_top1 = logps.token_logps.exp() > 0.5 + _BOUND_SLACK
    unclear = (~is_top1 & (logps.token_logps > -logps.entropy - _BOUND_SLACK)).nonzero().squeeze(1)
    is_top1[unclear] = most_likely_tokens(model, logps.hidden[unclear]) == targets[unclear]
    return is_top1
