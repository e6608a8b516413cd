"""Whether a model, in its present state, is computed exactly: clear refusals, never a silent approximation."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from kvpref.errors import UnsupportedModelError
from kvpref.models.families import FAMILIES, REFUSED, Refusal
from kvpref.models.randomness import random_numbers
from kvpref.models.vision.families import is_known

_MADE_OF_PARTS = "kvpref.models.reward_classes"
"""The module of classes built only from transformers' own parts."""

_REWARD_HEAD = "ForSequenceClassification"
_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "GenerationDecoder", _REWARD_HEAD)

SAFE_FALLBACK = "train it with transformers.Trainer or TRL until kvpref supports it"


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside DDP, torch.compile and PEFT wrappers.

    Raises:
        UnsupportedModelError: If there is none, or a wrapper changes what the model sees.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if getattr(getattr(inner, "active_peft_config", None), "is_prompt_learning", False):
            raise UnsupportedModelError(
                "PEFT prompt learning (prompt or prefix tuning) puts virtual tokens before every sequence, which "
                "kvpref does not follow; use LoRA"
            )
        wrapped = [getattr(inner, name, None) for name in ("module", "_orig_mod")]
        peft_base = inner.get_base_model() if hasattr(inner, "get_base_model") else None
        inner = next((module for module in (*wrapped, peft_base) if isinstance(module, nn.Module)), None)
        if inner is None:
            raise UnsupportedModelError(
                f"expected a transformers PreTrainedModel (possibly wrapped), got {type(model).__name__}"
            )
    return inner


def check_config(config: Any, *, listed_only: bool = True, padded_only: bool = False) -> None:
    """Check what the configuration alone tells: its family, and that of the language model in it.

    Args:
        config: The configuration of a model.
        listed_only: Whether to refuse families that nobody has checked, too.
        padded_only: Whether to allow families that are exact in mode ``padded`` only.

    Raises:
        UnsupportedModelError: With the reason and the nearest thing that works.
    """
    for name in dict.fromkeys((config.model_type, config.get_text_config(decoder=True).model_type)):
        refusal = REFUSED.get(name)
        if refusal is not None and not (padded_only and refusal.padded):
            raise _refused(name, refusal)
        if refusal is None and listed_only and name not in FAMILIES and not is_known(name):
            raise UnsupportedModelError(
                f"model type {name!r} is not among those known to be exact (docs/models.md lists them); "
                "kvpref.attach(model, verify=True) compares it with its own forward on two short groups and accepts it "
                f"if log-probs and gradients are equal. Otherwise {SAFE_FALLBACK}"
            )


def is_padded_only(config: Any) -> bool:
    """Whether models of a configuration are exact in mode ``padded`` only."""
    refusal = REFUSED.get(config.model_type)
    return refusal is not None and refusal.padded


def require_passes(model: PreTrainedModel) -> None:
    """Check that a model can run passes over shared prefixes.

    Raises:
        UnsupportedModelError: If it is exact in mode ``padded`` only.
    """
    if is_padded_only(model.config):
        raise _refused(model.config.model_type, REFUSED[model.config.model_type])


def _refused(name: str, refusal: Refusal) -> UnsupportedModelError:
    padded = "mode 'padded', ordinary training, is exact: --mode padded, or kvpref.attach(model, padded_only=True)"
    return UnsupportedModelError(
        f"model type {name!r} is not supported: {refusal.reason}; nearest supported family: {refusal.nearest}. "
        f"{padded if refusal.padded else SAFE_FALLBACK}"
    )


def is_custom_code(model: PreTrainedModel) -> bool:
    """Whether the model's class is not transformers' own; FSDP2 derives a class, which does not count."""
    own = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    return not own.__module__.startswith(("transformers.", _MADE_OF_PARTS))


def check_architecture(model: PreTrainedModel, *, listed_only: bool = True, padded_only: bool = False) -> None:
    """Check what does not change after loading: the configuration, and that the class is transformers' own.

    Args:
        model: An unwrapped model.
        listed_only: Whether to refuse custom code and families that nobody has checked, too.
        padded_only: As for `check_config`.

    Raises:
        UnsupportedModelError: With the reason and the nearest thing that works.
    """
    if listed_only and is_custom_code(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is custom code ({type(model).__module__}), which kvpref has not checked; load the "
            f"model with trust_remote_code=False where transformers has the architecture, else {SAFE_FALLBACK}"
        )
    check_config(model.config, listed_only=listed_only, padded_only=padded_only)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not supported: prompts go through an encoder, and kvpref runs decoders; "
            f"{SAFE_FALLBACK}"
        )
    if not type(model).__name__.endswith(_HEADS):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head and no reward head; load it with "
            "AutoModelForCausalLM, or with AutoModelForSequenceClassification and num_labels=1"
        )
    if type(model).__name__.endswith(_REWARD_HEAD) and model.config.num_labels != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} with {model.config.num_labels} labels is not a reward model; load it with "
            "num_labels=1"
        )


def check_training_state(model: PreTrainedModel) -> None:
    """Check what can change between forwards: dropout and gradient checkpointing.

    Raises:
        UnsupportedModelError: Naming the setting to change.
    """
    # Even if the root is in eval mode: PEFT adapters and frozen parts are switched separately.
    for name, module in model.named_modules():
        if not module.training:
            continue
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise UnsupportedModelError(
                f"dropout {module.p} in {name} makes two forwards of one token differ; set it to 0 in the config "
                "(attention_dropout, resid_pdrop, embd_pdrop, hidden_dropout, lora_dropout) or call model.eval()"
            )
        # Most families keep dropout as a number, and mode `padded` never passes attention's to kvpref.
        for setting, value in random_numbers(module):
            raise UnsupportedModelError(
                f"{setting.replace('_', ' ')} {value} in {name or 'the model'} makes two forwards of one token differ; "
                "set it to 0 in the config (attention_dropout, dropout, router_jitter_noise) or call model.eval()"
            )
        _refuse_sparse_mixer(name, module)
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant", True):
                raise UnsupportedModelError(
                    "re-entrant gradient checkpointing loses the gradient through the prefix cache; enable it with "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )


def _refuse_sparse_mixer(name: str, module: nn.Module) -> None:
    """Refuse PhiMoE's routers in training mode, where they sample experts whatever their noise."""
    if hasattr(module, "router_jitter_noise"):
        raise UnsupportedModelError(
            f"the router {name} draws experts at random in training mode, whatever its noise, so two forwards of one "
            "token differ; call .eval() on it or on the model"
        )
