"""Reward models of vision-language families for which transformers has no sequence-classification class.

This file is saved beside the weights of such a model, so that transformers alone can load it with
`AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)`. It imports only transformers.
"""

from typing import Any

import transformers
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GenericForSequenceClassification

_ENDING = "ForSequenceClassification"


def __getattr__(name: str) -> type:
    """The class of this name, such as ``Qwen2_5_VLForSequenceClassification``; made when it is first asked for."""
    family: Any = getattr(transformers, name.removesuffix(_ENDING) + "PreTrainedModel", None)
    if not name.endswith(_ENDING) or family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made: Any = type(name, (GenericForSequenceClassification, family), {"__module__": __name__, "__doc__": __doc__})
    made._auto_class = "AutoModelForSequenceClassification"  # saving writes this file too
    # Weights have other names in files than in models, and transformers picks the renaming by class.
    for known_by in (name.replace(_ENDING, "ForConditionalGeneration"), family.config_class.model_type):
        renamed = get_checkpoint_conversion_mapping(known_by)
        if renamed is not None:
            register_checkpoint_conversion_mapping(name, renamed, overwrite=True)
            break
    globals()[name] = made
    return made
