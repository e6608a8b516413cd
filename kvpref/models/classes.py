"""Which transformers class loads a model, given its configuration and what is read from it."""

from __future__ import annotations

from typing import Any

from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from kvpref.models import reward_classes


def sees_images(config: PreTrainedConfig) -> bool:
    """Whether models of this configuration take images beside text."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def model_class(config: PreTrainedConfig, reads: str = "tokens") -> Any:
    """The class that loads a model, with `from_pretrained(source, ...)` and `from_config(config, ...)`.

    Args:
        config: The model's configuration.
        reads: ``tokens``, log-probs of a language model; ``ends``, rewards of a scalar head.
    """
    if reads != "ends":
        return AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM
    # By name: a class loaded as remote code takes precedence over the mapping's own.
    if sees_images(config) and config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return _MadeRewardModel(config)
    return AutoModelForSequenceClassification


class _MadeRewardModel:
    """A class of `kvpref.models.reward_classes` with the interface of an auto class."""

    def __init__(self, config: PreTrainedConfig) -> None:
        kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        self._name = f"{kind.__name__.partition('For')[0]}ForSequenceClassification"

    def _class(self) -> Any:
        try:
            return getattr(reward_classes, self._name)
        except AttributeError as error:
            raise ValueError(f"transformers has no parts to build a {self._name} from") from error

    def from_pretrained(self, source: str, **settings: Any) -> Any:
        return self._class().from_pretrained(source, **settings)

    def from_config(self, config: PreTrainedConfig, **settings: Any) -> Any:
        return self._class()._from_config(config, **settings)
