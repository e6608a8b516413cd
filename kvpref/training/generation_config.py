"""Generation settings that transformers refuses to save: repaired in the saved copy, unchanged in the model."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator

from transformers import GenerationConfig, PreTrainedModel

_NAMED = re.compile(r"^- `(\w+)`:", re.MULTILINE)
"""Matches each setting's name in the error."""

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def repaired(config: GenerationConfig) -> tuple[GenerationConfig, tuple[str, ...]]:
    """A copy that can be saved, and the names of the settings left out of it.

    Sampling settings beside ``do_sample: false`` have no effect in `generate`, so leaving them out changes nothing.
    A configuration that cannot be saved at all is reduced to its special tokens.
    """
    names = unsavable(config)
    if not names:
        return config, ()
    saved = copy.deepcopy(config)
    for name in names:
        setattr(saved, name, None)
    if not unsavable(saved):
        return saved, names
    tokens = GenerationConfig(**{name: getattr(config, name, None) for name in _TOKENS})
    return tokens, tuple(sorted(name for name in config.to_diff_dict() if name not in _TOKENS))


def unsavable(config: GenerationConfig) -> tuple[str, ...]:
    """The settings for which transformers would refuse to save it once anything in it has changed."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return tuple(_NAMED.findall(str(error))) or ("everything",)
    return ()


@contextlib.contextmanager
def savable_generation_config(model: PreTrainedModel) -> Iterator[tuple[str, ...]]:
    """While open, the model's generation settings can be saved; yields the names of those left out."""
    config = getattr(model, "generation_config", None)
    if not isinstance(config, GenerationConfig) or not model.can_generate():
        yield ()
        return
    model.generation_config, names = repaired(config)
    try:
        yield names
    finally:
        model.generation_config = config
