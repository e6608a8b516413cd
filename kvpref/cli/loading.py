"""Models, and their tokenizers or processors, from what the command line names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpref.cli.adapters import is_adapter, load_adapter
from kvpref.cli.choices import DTYPES
from kvpref.cli.load_reports import NEW_HEAD, without_news
from kvpref.data import load_processor
from kvpref.data.reading.response_spans import tokenizer_of
from kvpref.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

_SCALAR_HEAD = "score."
"""How transformers names the weights of the head of AutoModelForSequenceClassification."""

_SETTINGS: dict[str, dict[str, Any]] = {"tokens": {}, "ends": {"num_labels": 1}}
"""By what the loss reads: settings of the model's configuration."""


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


def load_model(
    model: str | None,
    config: str | None,
    *,
    dtype: str = "float32",
    seed: int = 42,
    reads: str = "tokens",
    may_add_head: bool = False,
) -> PreTrainedModel:
    """A model with its weights, or one with random weights from a configuration.

    Args:
        model: Folder or hub name; also the folder of a PEFT adapter.
        config: JSON configuration, instead.
        dtype: Of the weights, one of `DTYPES`.
        seed: Of random weights.
        reads: What is read of it: ``tokens``, the log-probs of a language model, or ``ends``, rewards of a scalar head.
        may_add_head: Whether a model without scalar head may get a random one.

    Raises:
        InputError: If not exactly one of the two is given, loading fails, or weights are missing.
    """
    import torch

    from kvpref.models.classes import model_class

    if (model is None) == (config is None):
        raise InputError("name either MODEL (a folder or hub name) or --model-config FILE.json for random weights")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; choose from: {', '.join(DTYPES)}")
    settings = _SETTINGS[reads]
    torch.manual_seed(seed)
    if model is not None:
        if is_adapter(model):
            return load_adapter(model, reads=reads, dtype=dtype, **settings)
        kind = model_class(load_config(model), reads)
        settings = settings | {"dtype": dtype, "output_loading_info": True}
        with without_news(NEW_HEAD if reads == "ends" else {}):
            loaded, info = _load(kind.from_pretrained, model, "model", **settings)
        _check_head(model, info, reads=reads, may_add_head=may_add_head)
        return loaded
    assert config is not None
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    described = load_config(config)
    for key, value in settings.items():
        setattr(described, key, value)
    try:
        built: PreTrainedModel = model_class(described, reads).from_config(described, dtype=wanted)
    except ValueError as error:
        what = (
            "reward model (AutoModelForSequenceClassification)"
            if reads == "ends"
            else "causal language model (AutoModelForCausalLM)"
        )
        raise InputError(f"{config}: transformers has no {what} of type {described.model_type!r}") from error
    return built


def _check_head(source: str, info: dict[str, Any], *, reads: str, may_add_head: bool) -> None:
    """Refuse weights of another kind of model, which transformers would drop, or make up at random."""
    if reads == "tokens" and any(key.startswith(_SCALAR_HEAD) for key in info["unexpected_keys"]):
        raise InputError(
            f"{source}: holds a reward model, whose log-probs mean nothing; train it with a loss of rewards "
            "(bradley_terry, say), or score with --reward-model"
        )
    lacking = [key for key in sorted(info["missing_keys"]) if not (may_add_head and key.startswith(_SCALAR_HEAD))]
    if lacking:
        is_head = lacking[0].startswith(_SCALAR_HEAD)
        remedy = "; it is no reward model: kvpref train --loss bradley_terry makes one of it" if is_head else ""
        raise InputError(f"{source}: the weights lack {lacking[0]!r}, which would be random{remedy}")


def load_matching_processor(
    name: str | None, model_name: str | None, model: PreTrainedModel
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer named, or the one beside the model; a processor for a model that sees images, where there is one.

    Raises:
        InputError: If there is none, or it has more tokens than the model has embeddings.
    """
    from kvpref.models.classes import sees_images
    from kvpref.models.support import unwrap

    source = name or model_name
    if source is None:
        raise InputError("--model-config starts from random weights and needs --tokenizer")
    found: Any = load_processor(source)
    tokenizer = tokenizer_of(found)
    num_rows = num_embeddings(model)
    if len(tokenizer) > num_rows:
        raise InputError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens and the model {num_rows} embeddings; "
            "use the model's own tokenizer, or raise vocab_size in the configuration"
        )
    return found if sees_images(unwrap(model).config) else tokenizer


def num_embeddings(model: PreTrainedModel) -> int:
    """How many tokens the model has a row for."""
    from kvpref.models.partitioned import full_shape

    embeddings: Any = model.get_input_embeddings()
    return full_shape(embeddings.weight)[0]


def _load(loader: Any, source: str, what: str, **kwargs: Any) -> Any:
    try:
        return loader(source, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{source}: cannot load the {what}: {reason}; give a folder with config.json and weights, or a hub name"
        ) from error
