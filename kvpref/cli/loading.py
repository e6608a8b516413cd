"""Models and tokenizers from what the command line names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpref.data import load_tokenizer
from kvpref.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16", "auto")


def load_config(source: str) -> PreTrainedConfig:
    """A model configuration from a folder, a hub name or a JSON file.

    Raises:
        InputError: If it cannot be read or names no known model type.
    """
    from transformers import AutoConfig

    path = Path(source)
    if path.suffix != ".json":
        return _load(AutoConfig.from_pretrained, source, "model")
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{source}: cannot read the model configuration: {error}") from error
    model_type = values.pop("model_type", None) if isinstance(values, dict) else None
    if model_type is None:
        raise InputError(f'{source}: expected a JSON object with a "model_type", such as "llama"')
    try:
        return AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error


def load_model(model: str | None, config: str | None, *, dtype: str = "float32", seed: int = 42) -> PreTrainedModel:
    """A model with its weights, or one with random weights from a configuration.

    Raises:
        InputError: If not exactly one of the two is given, or loading fails.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if (model is None) == (config is None):
        raise InputError("name either MODEL (a folder or hub name) or --config CONFIG.json for random weights")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; choose from: {', '.join(DTYPES)}")
    if model is not None:
        return _load(AutoModelForCausalLM.from_pretrained, model, "model", dtype=dtype)
    assert config is not None
    torch.manual_seed(seed)
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    return AutoModelForCausalLM.from_config(load_config(config), dtype=wanted)


def load_matching_tokenizer(
    name: str | None, model_name: str | None, model: PreTrainedModel
) -> PreTrainedTokenizerBase:
    """The tokenizer named, or the one beside the model; its ids must fit the model's vocabulary.

    Raises:
        InputError: If there is none, or it has more tokens than the model has embeddings.
    """
    source = name or model_name
    if source is None:
        raise InputError("--config starts from random weights and needs --tokenizer")
    tokenizer = load_tokenizer(source)
    embeddings: Any = model.get_input_embeddings()
    num_embeddings = embeddings.weight.shape[0]
    if len(tokenizer) > num_embeddings:
        raise InputError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens and the model {num_embeddings} embeddings; "
            "use the model's own tokenizer, or raise vocab_size in the configuration"
        )
    return tokenizer


def _load(loader: Any, source: str, what: str, **kwargs: Any) -> Any:
    try:
        return loader(source, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{source}: cannot load the {what}: {reason}; give a folder with config.json and weights, or a hub name"
        ) from error
