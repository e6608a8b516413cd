"""Whether a call on a padded batch may be computed as a prefix tree.

Every check raises `UnservedError` with the reason. Shape legend: B rows of L columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpref.errors import UnsupportedModelError
from kvpref.integrations.shared_prefix.padded_rows import UnservedError
from kvpref.integrations.shared_prefix.selected_attention import checkpointed_layers
from kvpref.models.support import check_training_state

# What the pass reads, and what only the head and its loss read.
_KNOWN = frozenset(
    {"input_ids", "attention_mask", "position_ids", "labels", "shift_labels", "num_items_in_batch", "ignore_index"}
)
# Outputs that a pass over unique tokens does not have in the padded batch's shape. Left out or False is fine.
_OUTPUTS = frozenset({"use_cache", "output_attentions", "output_hidden_states", "output_router_logits"})
# Some models pass these to their backbone as set in the config; the tower reads them there.
_TOWER_SETTINGS = frozenset({"vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio"})
# PEFT passes these to its layers by hooks, one entry per row of the batch.
_PER_ROW_ADAPTERS = frozenset({"adapter_names", "alora_offsets"})


class CallReader:
    """Finds a forward's arguments by name."""

    def __init__(self, module: nn.Module) -> None:
        self._signature = inspect.signature(type(module).forward)
        self._module = module

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The given arguments, by name.

        Raises:
            UnservedError: If they do not fit the signature; the module itself reports that better.
        """
        if not args:
            return kwargs
        try:
            given = self._signature.bind_partial(self._module, *args, **kwargs).arguments
        except TypeError:
            raise UnservedError("arguments that forward does not take") from None
        others = given.pop("kwargs", {})
        return {**given, **others}


def check_arguments(arguments: dict[str, Any], config: Any, image_names: tuple[str, ...] = ()) -> None:
    """Check that the backbone gets input ids, and nothing is asked for that a pass over unique tokens cannot give.

    Args:
        arguments: The arguments of its forward, by name.
        config: The model's config.
        image_names: Image arguments that are understood.
    """
    for name, value in arguments.items():
        of_tower = image_names and name in _TOWER_SETTINGS and value == getattr(config, name, None)
        known = name in _KNOWN or name in image_names or of_tower
        harmless = value is None or known or (value is False and name in _OUTPUTS)
        keeps_all = name == "logits_to_keep" and isinstance(value, int) and value == 0
        if not (harmless or keeps_all or (value is True and name == "return_dict") or name == "self"):
            raise UnservedError(name)
    for name in ("output_attentions", "output_hidden_states"):
        if arguments.get(name) is None and getattr(config, name, False):
            raise UnservedError(name)
    if arguments.get("return_dict") is None and not getattr(config, "return_dict", True):
        raise UnservedError("return_dict")
    _check_shapes(*(arguments.get(name) for name in ("input_ids", "attention_mask", "position_ids")))


def _check_shapes(input_ids: Any, mask: Any, position_ids: Any) -> None:
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or not input_ids.numel():
        raise UnservedError("input_ids that are not (rows, columns)")
    if len(input_ids) == 1:
        raise UnservedError("one row")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.shape == input_ids.shape):
        raise UnservedError("attention_mask that is not (rows, columns)")
    if mask is not None and mask.is_floating_point():
        raise UnservedError("attention_mask of floats")
    if position_ids is not None and position_ids.shape not in (input_ids.shape, (1, input_ids.shape[1])):
        raise UnservedError("position_ids that are not (rows, columns)")


def check_state(model: PreTrainedModel) -> None:
    """Check that a token's hidden state depends on its prefix alone: no dropout, noise or adapters by row."""
    try:
        checkpointed_layers(model)
    except UnsupportedModelError:
        raise UnservedError("gradient checkpointing") from None
    try:
        check_training_state(model)
    except UnsupportedModelError:  # checkpointing has been checked already, so this is something else
        raise UnservedError("dropout") from None
    embeddings = model.get_input_embeddings()
    if embeddings.training and getattr(embeddings, "neftune_noise_alpha", None):
        raise UnservedError("neftune_noise_alpha")
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, partial) and not _PER_ROW_ADAPTERS.isdisjoint(hook.keywords):
                raise UnservedError("adapters that differ by row")


def check_head(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Check that the model's head does not read padding, whose hidden states a served call leaves at zero."""
    name = type(model).__name__
    next(check for ending, check in _HEADS.items() if name.endswith(ending))(model, arguments)


def _check_labels(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Refuse labels predicted from padding: labels by the column before, `shift_labels` by their own column."""
    mask, ignored = arguments.get("attention_mask"), arguments.get("ignore_index", -100)
    labels, shifted = arguments.get("labels"), arguments.get("shift_labels")
    if labels is not None and shifted is None:
        labels, columns = labels[:, 1:], slice(None, -1)
    else:
        labels, columns = shifted, slice(None)
    if mask is not None and labels is not None:
        padding = mask[:, columns].to(labels.device) == 0
        if ((labels != ignored) & padding).any():
            raise UnservedError("labels that padding predicts")


def _check_pooling(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Refuse pooled rows in which the rightmost non-padding token, read whatever the mask says, is masked."""
    input_ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if mask is None or input_ids is None:
        return
    pad = model.config.get_text_config().pad_token_id
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    read = columns[-1:].expand(len(input_ids)) if pad is None else ((input_ids != pad) * columns).argmax(dim=1)
    if (mask.gather(1, read.to(mask.device).unsqueeze(1)) == 0).any():
        raise UnservedError("pooling at padding")


# By the end of the class's name, as `kvpref.models.support` knows them.
_HEADS: dict[str, Callable[[PreTrainedModel, dict[str, Any]], None]] = {
    "ForCausalLM": _check_labels,
    "LMHeadModel": _check_labels,
    "ForConditionalGeneration": _check_labels,
    "ForSequenceClassification": _check_pooling,
}
