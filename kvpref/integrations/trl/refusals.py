"""What of TRL's options cannot work, by name, with the reason and what to do instead.

To refuse another: a row in `REFUSALS`; the tests run over it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transformers import ProcessorMixin

from kvpref.errors import InputError
from kvpref.integrations.trl.setup import Setup
from kvpref.models.positions import reads_distances_only
from kvpref.models.support import check_config
from kvpref.models.vision.splitting import SPLIT_FAMILIES
from kvpref.parallel.sharding import is_zero_3

_ANY = frozenset({"DPOTrainer", "GRPOTrainer", "KTOTrainer", "RewardTrainer"})
_GRPO = frozenset({"GRPOTrainer"})

# By column; others with learned positions leave padding out, or count from each row's first token.
_LEARNED_POSITIONS = frozenset({"biogpt", "gpt2", "gpt_bigcode"})

# TRL switches off the modules of class Dropout; these rates are numbers that attention layers read.
_NUMERIC_DROPOUT = ("attention_dropout",)
# Of modules; the rates of heads that a language model does not have are left out.
_MODULE_DROPOUT = ("hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "embedding_dropout", "resid_dropout")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One thing that cannot work."""

    name: str
    """The option, as the user writes it."""

    applies: Callable[[Setup], bool]
    """Whether a setup asks for it."""

    reason: str
    """Why, and what to do."""

    trainers: frozenset[str] = _ANY
    """TRL's classes that have it."""


def refuse_unsupported(setup: Setup) -> None:
    """Raise for the first row of `REFUSALS` that applies, then for what the model's configuration alone tells.

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


def _fsdp(setup: Setup) -> bool:
    # accelerate's own launcher says it in the environment only.
    return bool(setup.option("fsdp")) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def _zero_3(setup: Setup) -> bool:
    return is_zero_3(setup.option("deepspeed_plugin"))


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
        reason="it replaces layers by ones that kvpref has not checked; leave it out",
    ),
    Refusal(
        name="activation_offloading=True",
        applies=lambda setup: bool(setup.option("activation_offloading")),
        reason="nobody has checked it with keys and values that many responses read; use gradient_checkpointing",
    ),
    Refusal(
        name="neftune_noise_alpha",
        applies=lambda setup: setup.option("neftune_noise_alpha") is not None,
        reason="a shared prompt is embedded once, so its rows could not get noise of their own; leave it out",
    ),
    Refusal(
        name="parallelism_config with context, sequence or tensor parallelism",
        applies=_splits_sequences_or_weights,
        reason="attention over shared prompts needs whole sequences and whole heads; use data parallelism",
    ),
    Refusal(
        name="fsdp",
        applies=_fsdp,
        reason="nobody has checked it here; use DistributedDataParallel, or FSDP2 with kvpref.PreferenceTrainer",
    ),
    Refusal(
        name="DeepSpeed ZeRO stage 3",
        applies=_zero_3,
        reason="the LM head's weight is read outside its module, where ZeRO-3 keeps it empty; use stage 1 or 2, or DDP",
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
        reason="which pixel inputs belong to which image is not known (docs/trl.md lists the families of which it is); "
        "use TRL's trainer, or kvpref.PreferenceTrainer",
        trainers=_ANY - {"RewardTrainer"},
    ),
    Refusal(
        name="PEFT prompt learning (prompt, prefix or p-tuning)",
        applies=lambda setup: any(getattr(config, "is_prompt_learning", False) for config in setup.peft_configs),
        reason="it puts virtual tokens before every row; use LoRA",
    ),
    Refusal(
        name="activated LoRA (alora_invocation_tokens)",
        applies=lambda setup: any(getattr(config, "alora_invocation_tokens", None) for config in setup.peft_configs),
        reason="it finds its tokens in padded rows, and kvpref lays rows out anew; use LoRA",
    ),
    Refusal(
        name="lora_dropout",
        applies=_has_lora_dropout,
        reason="set lora_dropout=0 in the LoraConfig, or disable_dropout=True in the trainer's arguments; it makes two "
        "forwards of one token differ",
    ),
    Refusal(
        name="dropout in training",
        applies=_has_dropout,
        reason="it makes two forwards of one token differ; set disable_dropout=True, and attention_dropout to 0 in the "
        "model's config",
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
