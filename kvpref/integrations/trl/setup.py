"""The arguments of one of TRL's trainers, as far as known before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from kvpref.models.support import is_custom_code

# Options that decide which file a model's configuration is read from.
_LOADING = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
_DROPOUT_STAYS = frozenset({"AsyncGRPOTrainer", "GRPOTrainer"})
"""TRL's classes that leave dropout on by default; the others switch it off."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The arguments of a trainer."""

    trainer: str
    """TRL's class, by name."""

    args: Any
    """Its configuration; None for TRL's defaults."""

    model: Any
    """A model, or where to load one from."""

    config: Any
    """The model's configuration."""

    peft_configs: tuple[Any, ...]
    """PEFT's configurations, the model's own or to be applied."""

    processing_class: Any
    """A tokenizer or processor; None to load it with the model."""

    has_custom_code: bool = False
    """Whether the model is, or would be, of a class that is not transformers' own."""

    @classmethod
    def from_arguments(cls, trainer: str, given: Mapping[str, Any]) -> Setup:
        """From the arguments of a trainer's constructor, by name."""
        args, model = given.get("args"), given["model"]
        peft_config = given.get("peft_config")
        own = getattr(model, "peft_config", None)
        config, has_custom_code = _config_of(model, args)
        return cls(
            trainer=trainer,
            args=args,
            model=model,
            config=config,
            peft_configs=tuple(own.values())
            if isinstance(own, dict)
            else ()
            if peft_config is None
            else (peft_config,),
            processing_class=given.get("processing_class"),
            has_custom_code=has_custom_code,
        )

    def option(self, name: str, default: Any = None) -> Any:
        """The value of one of TRL's or transformers' arguments."""
        return getattr(self.args, name, default)

    @property
    def disables_dropout(self) -> bool:
        """Whether TRL switches off Dropout modules."""
        return bool(self.option("disable_dropout", self.trainer not in _DROPOUT_STAYS))

    def loading_option(self, name: str) -> Any:
        """One of the arguments with which TRL loads a model; None if not given, or if there is nothing to load."""
        return None if isinstance(self.model, nn.Module) else (self.option("model_init_kwargs") or {}).get(name)


def asks_fsdp(setup: Setup, name: str, variable: str) -> bool:
    """Whether an FSDP setting is on, in transformers' arguments or through accelerate's launcher.

    Args:
        setup: The trainer's arguments.
        name: The setting's name in accelerate's plug-in.
        variable: The environment variable in which the launcher passes it.
    """
    plugin = setup.option("fsdp_plugin_args")
    if plugin is not None:
        return bool(plugin.get(name))
    return _is_true("ACCELERATE_USE_FSDP") and _is_true(variable)


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _config_of(model: Any, args: Any) -> tuple[Any, bool]:
    """The model's configuration, and whether its class is custom code; none of that code is run."""
    if isinstance(model, nn.Module):
        unwrap_peft: Any = getattr(model, "get_base_model", lambda: model)
        base = unwrap_peft()
        return model.config, isinstance(base, PreTrainedModel) and is_custom_code(base)
    kwargs = getattr(args, "model_init_kwargs", None) or {}
    loading = {name: kwargs[name] for name in _LOADING if name in kwargs}
    settings, _ = PreTrainedConfig.get_config_dict(model, **loading)
    trusted = kwargs.get("trust_remote_code", getattr(args, "trust_remote_code", False))
    if settings.get("auto_map") and (trusted or settings.get("model_type") not in CONFIG_MAPPING):
        return PreTrainedConfig.from_dict(settings), True
    return AutoConfig.from_pretrained(model, **loading), False
