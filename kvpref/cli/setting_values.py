"""What the value of a setting may be: its type, where the sources of its class name a plain one, and its range."""

from __future__ import annotations

import ast
from functools import cache
from types import NoneType
from typing import Any, get_type_hints

from kvpref.cli.choices import read_choice
from kvpref.cli.declared_names import loss_settings, losses, training_arguments
from kvpref.cli.given_settings import LOSS_ARG, OWN_NAMES, Given, Settings
from kvpref.cli.run_config import RunConfig
from kvpref.cli.typed_values import read_value

ABOVE_ZERO = frozenset({"num_train_epochs", "logging_steps", "eval_steps", "save_steps", "lora_alpha"})
"""Numbers that must be above 0."""

AT_LEAST_ONE = frozenset(
    {
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "eval_accumulation_steps",
        "save_total_limit",
        "dataloader_prefetch_factor",
        "max_prompt_tokens",
        "max_response_tokens",
        "max_image_pixels",
        "lora_r",
        "early_stopping_patience",
        "max_tokens_per_micro_batch",
        "max_tokens_per_chunk",
        "max_prefix_depth",
        "sequence_parallel",
        "sort_window_steps",
        "reference_sync_steps",
        "torch_empty_cache_steps",
        "min_shared_tokens",
    }
)
"""Counts that must be at least 1. All other numbers must be at least 0, but for those in `MAY_BE_MINUS_ONE`."""

MAY_BE_MINUS_ONE = frozenset({"max_steps", "local_rank"})
"""Numbers for which -1 stands for none."""

_PLAIN = {kind.__name__: kind for kind in (bool, int, float, str, list, dict)}


def check_values(given: Settings, *, loss: str | None) -> None:
    """Refuse values of another type or out of range, as far as that is known without importing torch.

    Args:
        given: Settings by name, all of which there are.
        loss: The loss of the run; None if it is not known yet, or the user's own.

    Raises:
        InputError: For the first such value.
    """
    for name, item in given.items():
        kind = plain_type(name, loss)
        if kind is not None:
            read_setting(name, item, kind)


def read_setting(name: str, given: Given, kind: Any) -> Any:
    """The value of a setting as its type.

    Args:
        name: Of the setting; of a loss's begins with `LOSS_ARG`.
        given: Its value.
        kind: Its type, as in an annotation.

    Raises:
        InputError: If it is of another type, or out of its range.
    """
    if name.startswith(LOSS_ARG):
        return read_value(given.value, kind, given.where)
    value = read_choice(name, given.value, given.where)
    if name == "lora_target_modules" and isinstance(value, list):
        value = ",".join(map(str, value))  # as TRL's files have it
    return read_value(value, kind, given.where, **_range(name, value))


def _range(name: str, value: Any) -> dict[str, float]:
    if name in ABOVE_ZERO:
        return {"above": 0}
    if name in MAY_BE_MINUS_ONE and value in (-1, "-1"):
        return {}
    return {"at_least": 1 if name in AT_LEAST_ONE or name == "max_steps" else 0}


@cache
def plain_type(name: str, loss: str | None) -> Any:
    """The type of a setting of a run, or of the loss, if only Python's own types are in it; otherwise None."""
    if name in OWN_NAMES:
        return get_type_hints(RunConfig)[name]
    if not name.startswith(LOSS_ARG):
        return _read_annotation(training_arguments().get(name, ""))
    settings = loss_settings(loss) if loss is not None and loss in losses() else {}
    return _read_annotation(settings.get(name.removeprefix(LOSS_ARG), ""))


def _read_annotation(text: str) -> Any:
    try:
        return _read_node(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError):
        return None


def _read_node(node: ast.expr) -> Any:
    """KeyError for what is not plain: its type is known only once its class is imported."""
    match node:
        case ast.Name(id=name):
            return _PLAIN[name]
        case ast.Constant(value=None):
            return NoneType
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _read_node(left) | _read_node(right)
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return list[_read_node(item)]  # type: ignore[misc]
    raise KeyError(ast.unparse(node))
