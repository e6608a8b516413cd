"""Rotary embeddings whose frequencies depend on the longest position of the current forward.

Each sequence alone would get the frequencies of its own length. Passes hold tokens of several sequences, so they are
exact only where all lengths lead to the same frequencies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvpref.errors import UnsupportedModelError
from kvpref.records.groups import Group

LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """Every set of rotary parameters in a text config, also if given per layer type."""
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, name, None)
        if isinstance(parameters, dict):
            nested = [value for value in parameters.values() if isinstance(value, dict)]
            for mapping in (parameters, *nested):
                if isinstance(mapping.get("rope_type", mapping.get("type")), str):
                    yield mapping


def length_thresholds(model: PreTrainedModel) -> dict[int, str]:
    """Lengths in tokens up to which frequencies do not depend on the length, with the rope type they come from."""
    config = model.config.get_text_config(decoder=True)
    found = {}
    for parameters in rope_parameters(config):
        kind = parameters.get("rope_type", parameters.get("type"))
        if kind == "longrope":
            found[_original_length(config, parameters)] = kind
        elif kind == "dynamic":
            # At the threshold itself a model that has seen longer sequences keeps their frequencies.
            found[config.max_position_embeddings - 1] = kind
    return found


def check_lengths(model: PreTrainedModel, groups: Iterable[Group]) -> None:
    """Check that the lengths of all sequences lead to the same rotary frequencies.

    Args:
        model: Attached.
        groups: The groups of a batch, or of all batches that share passes.

    Raises:
        UnsupportedModelError: If they do not; the message names a sequence.
    """
    thresholds = length_thresholds(model)
    if not thresholds:
        return
    lengths = {
        (number, place): len(sequence)
        for number, group in enumerate(groups)
        for place, sequence in enumerate(group.parts)
    }
    for threshold, kind in thresholds.items():
        long = max(lengths, key=lengths.__getitem__)
        short = min(lengths, key=lengths.__getitem__)
        if lengths[long] <= threshold:
            continue
        told = f"sequence {long[1]} of group {long[0]} holds {lengths[long]} tokens"
        if kind == "dynamic":
            raise UnsupportedModelError(
                f"{told}, and rope type 'dynamic' picks separate frequencies for each length over {threshold}, so "
                f"passes over shared tokens would disagree; keep sequences within {threshold} tokens"
            )
        if lengths[short] <= threshold:
            raise UnsupportedModelError(
                f"{told} and sequence {short[1]} of group {short[0]} {lengths[short]}, and rope type {kind!r} picks "
                f"other frequencies over {threshold}, so passes that hold both would be wrong for one; keep all "
                f"sequences of a batch on one side of {threshold} tokens"
            )


@contextmanager
def long_frequencies(model: PreTrainedModel, num_tokens: int) -> Iterator[None]:
    """Let passes over parts of long sequences use the frequencies of the whole sequences.

    Args:
        model: Attached; its batch has passed `check_lengths`.
        num_tokens: Length of the longest sequence.

    Raises:
        UnsupportedModelError: If the model computes frequencies inside its layers, where a checkpoint that recomputes
            them would use those of short sequences.
    """
    over = [kind for threshold, kind in length_thresholds(model).items() if num_tokens > threshold]
    if not over:
        yield
        return
    if "dynamic" in over:
        raise UnsupportedModelError(
            f"rope type 'dynamic' picks separate frequencies for each length over those it was trained on, "
            f"and this batch holds a sequence of {num_tokens} tokens; keep sequences shorter"
        )
    swapped = []
    for module in _longrope_modules(model):
        swapped.append((module, module.original_inv_freq))
        module.original_inv_freq = _long_frequencies(module)
    try:
        yield
    finally:
        for module, original in swapped:
            module.original_inv_freq = original


def _longrope_modules(model: PreTrainedModel) -> list[Any]:
    inside = {
        id(module)
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
        for module in layer.modules()
    }
    found: list[Any] = [module for module in model.modules() if _is_longrope(module)]
    if not found or any(id(module) in inside for module in found):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps rope type 'longrope' where kvpref cannot hold its frequencies; keep "
            f"sequences within {min(length_thresholds(model))} tokens"
        )
    return found


def _is_longrope(module: nn.Module) -> bool:
    return getattr(module, "rope_type", None) == "longrope" and hasattr(module, "original_inv_freq")


def _long_frequencies(module: Any) -> Any:
    long = getattr(module, "long_inv_freq", None)
    if long is None:
        threshold = module.config.rope_parameters["original_max_position_embeddings"]
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, module.inv_freq.device, seq_len=threshold + 1)
    return long


def _original_length(config: Any, parameters: Mapping[str, Any]) -> int:
    original = parameters.get("original_max_position_embeddings")
    return int(original or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings)
