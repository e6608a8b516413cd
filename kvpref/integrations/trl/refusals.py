"""TRL's options that cannot work, by name, with the reason and what to do instead.

To refuse another: a row in `REFUSALS`; the tests run over it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn
from transformers import ProcessorMixin

from kvpref.errors import InputError
from kvpref.integrations.trl.setup import Setup, asks_fsdp
from kvpref.models.positions import reads_distances_only
from kvpref.models.support import check_config
from kvpref.models.vision.splitting import SPLIT_FAMILIES

_ANY = frozenset({"AsyncGRPOTrainer", "DPOTrainer", "GRPOTrainer", "KTOTrainer", "RewardTrainer"})
_GRPO = frozenset({"GRPOTrainer"})
_ASYNC = frozenset({"AsyncGRPOTrainer"})

# Positions by column; other models with learned positions skip padding, or count from each row's first token.
_LEARNED_POSITIONS = frozenset({"biogpt", "gpt2", "gpt_bigcode"})

# TRL switches off Dropout modules; these rates are numbers that attention layers read.
_NUMERIC_DROPOUT = ("attention_dropout",)
# Rates of modules; those of heads that a language model does not have are left out.
_MODULE_DROPOUT = ("hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "embedding_dropout", "resid_dropout")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One option of TRL's that kvpref refuses."""

    name: str
    """The option as the user writes it."""

    applies: Callable[[Setup], bool]
    """Whether a setup uses it."""

    reason: str
    """Why, and what to do."""

    trainers: frozenset[str] = _ANY
    """The TRL classes that have it."""


def refuse_unsupported(setup: Setup) -> None:
    """Raise for the first row of `REFUSALS` that applies, then for anything the model's configuration alone rules out.

    Raises:
        InputError: With the option's name, the reason and what to do.
        UnsupportedModelError: If the model's family is not supported.
    """
    for refusal in REFUSALS:
        if setup.trainer in refusal.trainers and refusal.applies(setup):
            raise InputError(f"kvpref's {setup.trainer} does not support {refusal.name}: {refusal.reason}")
    check_config(setup.config)


def _reentrant(setup: Setup) -> bool:
    kwargs = setup.option("gradient_checkpointing_kwargs") or {}
    return bool(setup.option("gradient_checkpointing") and kwargs.get("use_reentrant"))


def _splits_sequences_or_weights(setup: Setup) -> bool:
    parallelism = setup.option("parallelism_config")
    return parallelism is not None and any(
        getattr(parallelism, f"{kind}_enabled", False) for kind in ("cp", "sp", "tp")
    )


def _first_fsdp(setup: Setup) -> bool:
    if setup.option("fsdp"):
        return int((setup.option("fsdp_config") or {}).get("version", 2)) == 1
    # accelerate's launcher sets it only in the environment.
    uses_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    return uses_fsdp and os.environ.get("FSDP_VERSION", "1") == "1"


def _has_no_weights(setup: Setup) -> bool:
    return isinstance(setup.model, nn.Module) and any(weight.is_meta for weight in setup.model.parameters())


def _several_devices(setup: Setup) -> bool:
    return len(set((getattr(setup.model, "hf_device_map", None) or {}).values())) > 1


def _is_multimodal(setup: Setup) -> bool:
    return isinstance(setup.processing_class, ProcessorMixin) or hasattr(setup.config, "vision_config")


def _has_unknown_images(setup: Setup) -> bool:
    return _is_multimodal(setup) and setup.config.model_type not in SPLIT_FAMILIES


def _counts_padding(setup: Setup) -> bool:
    """Whether a row's numbers depend on the column of its first token."""
    text = setup.config.get_text_config()
    if text.model_type == "llama4_text":
        return bool(text.attn_temperature_tuning)
    rotary = getattr(text, "rope_parameters", None) is not None
    return text.model_type in _LEARNED_POSITIONS or (rotary and not reads_distances_only(setup.config))


def _balances_routers(setup: Setup) -> bool:
    """As TRL decides it: by its own argument, or else by the model's."""
    text = setup.config.get_text_config()
    given = setup.option("router_aux_loss_coef")
    coefficient = getattr(text, "router_aux_loss_coef", 0.0) if given is None else given
    return hasattr(text, "output_router_logits") and coefficient != 0


def _dropout_rates(setup: Setup) -> Iterator[float | None]:
    """Rates that would be above zero in training."""
    yield from (getattr(setup.config, name, 0.0) for name in _NUMERIC_DROPOUT)
    if not setup.disables_dropout:
        yield from (getattr(setup.config, name, 0.0) for name in _MODULE_DROPOUT)


def _has_lora_dropout(setup: Setup) -> bool:
    rates = [getattr(config, "lora_dropout", 0.0) for config in setup.peft_configs]
    return not setup.disables_dropout and any(rate is not None and rate > 0 for rate in rates)


def _has_dropout(setup: Setup) -> bool:
    return any(rate is not None and rate > 0 for rate in _dropout_rates(setup))


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        name="custom code (trust_remote_code)",
        applies=lambda setup: setup.has_custom_code,
        reason="kvpref has checked transformers' own models only; load it with trust_remote_code=False where "
        "transformers has the architecture, or use TRL's trainer",
    ),
    Refusal(
        name="gradient_checkpointing_kwargs={'use_reentrant': True}",
        applies=_reentrant,
        reason="re-entrant checkpointing loses the gradient through the shared prompts; set use_reentrant to False",
    ),
    Refusal(
        name="torch_compile=True",
        applies=lambda setup: bool(setup.option("torch_compile")),
        reason="it compiles the whole forward, which plans each batch in Python; leave it out",
    ),
    Refusal(
        name="model_init_kwargs={'use_kernels': True}",
        applies=lambda setup: bool(setup.loading_option("use_kernels")),
        reason="it replaces layers with ones that kvpref has not checked; leave it out",
    ),
    Refusal(
        name="activation_offloading=True",
        applies=lambda setup: bool(setup.option("activation_offloading")),
        reason="it has not been checked with keys and values that many responses read; use gradient_checkpointing",
    ),
    Refusal(
        name="neftune_noise_alpha",
        applies=lambda setup: setup.option("neftune_noise_alpha") is not None,
        reason="a shared prompt is embedded once, so its rows could not get separate noise; leave it out",
    ),
    Refusal(
        name="parallelism_config with context, sequence or tensor parallelism",
        applies=_splits_sequences_or_weights,
        reason="attention over shared prompts needs whole sequences and whole heads; use data parallelism",
    ),
    Refusal(
        name="the first version of FSDP",
        applies=_first_fsdp,
        reason="it gathers weights for one forward pass only, and kvpref runs several; set fsdp_config={'version': 2}, "
        "or fsdp_version: 2 in accelerate's configuration",
    ),
    Refusal(
        name="FSDP's cpu_offload",
        applies=lambda setup: asks_fsdp(setup, "cpu_offload", "FSDP_OFFLOAD_PARAMS"),
        reason="it has not been shown to be exact here; leave it out, and for less memory use more ranks or LoRA",
    ),
    Refusal(
        name="a model without weights (on the meta device)",
        applies=_has_no_weights,
        reason="kvpref looks at the weights before they are sharded; load them on every rank "
        "(FSDP_CPU_RAM_EFFICIENT_LOADING=false), or let the trainer load them",
    ),
    Refusal(
        name="a model split over several devices (device_map)",
        applies=_several_devices,
        reason="all passes over a batch run on one device; load the model on one, or use data parallelism",
    ),
    Refusal(
        name="vision-language models as reward models",
        applies=_is_multimodal,
        reason="TRL's collator for rewards reads no images; use kvpref.PreferenceTrainer with loss='bradley_terry'",
        trainers=frozenset({"RewardTrainer"}),
    ),
    Refusal(
        name="vision-language models of this family",
        applies=_has_unknown_images,
        reason="which pixel inputs belong to which image is not known (docs/trl.md lists the known families); "
        "use TRL's trainer, or kvpref.PreferenceTrainer",
        trainers=_ANY - {"RewardTrainer"} - _ASYNC,
    ),
    Refusal(
        name="vision-language models in rows without images",
        applies=_is_multimodal,
        reason="TRL trains their text model alone, which has not been compared; use GRPOTrainer",
        trainers=_ASYNC,
    ),
    Refusal(
        name="router_aux_loss_coef above 0",
        applies=_balances_routers,
        reason="TRL's load-balancing loss counts each token of a tree row once, however many samples hold it; set "
        "router_aux_loss_coef=0",
        trainers=_ASYNC,
    ),
    Refusal(
        name="PEFT prompt learning (prompt, prefix or p-tuning)",
        applies=lambda setup: any(getattr(config, "is_prompt_learning", False) for config in setup.peft_configs),
        reason="it puts virtual tokens before every row; use LoRA",
    ),
    Refusal(
        name="activated LoRA (alora_invocation_tokens)",
        applies=lambda setup: any(getattr(config, "alora_invocation_tokens", None) for config in setup.peft_configs),
        reason="it finds its tokens in padded rows, and kvpref rearranges rows; use LoRA",
    ),
    Refusal(
        name="lora_dropout",
        applies=_has_lora_dropout,
        reason="set lora_dropout=0 in the LoraConfig, or disable_dropout=True where the trainer has it; it makes two "
        "forwards of one token differ",
    ),
    Refusal(
        name="dropout in training",
        applies=_has_dropout,
        reason="it makes two forwards of one token differ; set disable_dropout=True where the trainer has it, or the "
        "rates in the model's config to 0, attention_dropout among them",
    ),
    Refusal(
        name="cast_lm_head_to_fp32=True",
        applies=lambda setup: bool(setup.option("cast_lm_head_to_fp32")),
        reason="kvpref keeps the LM head in its dtype and its sums in fp32; leave it out",
        trainers=_GRPO,
    ),
    Refusal(
        name="use_transformers_continuous_batching=True",
        applies=lambda setup: bool(
            setup.option("use_transformers_continuous_batching") or setup.option("use_transformers_paged")
        ),
        reason="paged generation selects its own attention in the model that kvpref runs; use vLLM or plain generate",
        trainers=_GRPO,
    ),
    Refusal(
        name="models to which padding before a prompt counts (gpt2, llama4 and others)",
        applies=_counts_padding,
        reason="TRL counts the padding before prompts as positions and kvpref does not, so log-probs would differ from "
        "TRL's; use a model that reads distances alone, as most with rotary embeddings do",
        trainers=_GRPO,
    ),
)
"""TRL's options that are refused; the first that applies is reported."""
