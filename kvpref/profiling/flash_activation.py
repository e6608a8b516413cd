"""The state of `torch.nn.attention.activate_flash_attention_impl` here: what it replaced in this process, and whether
PyTorch can handle the return values of the installed flash-attn-4.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch

from kvpref.ops.attention.backends import torch_flash
from kvpref.ops.attention.backends.flash_attn import FlashAttn4

_FORWARD = "_flash_attn_fwd"


def activation_warnings() -> list[str]:
    """A warning if something is active, and one if activating FlashAttention-4 would fail."""
    replaced, package = torch_flash.replaced_reason(), FlashAttn4.package
    warnings = [] if replaced is None else [replaced]
    if package.missing_reason() is not None:
        return warnings
    taken, returned = values_taken(), values_returned(getattr(package.load(), _FORWARD))
    if taken is not None and returned is not None and taken != returned:
        warnings.append(
            f'torch.nn.attention.activate_flash_attention_impl("FA4") does not work: torch {torch.__version__} takes '
            f"{taken} values from {package.name_and_version()}, which returns {returned}; use kvpref's backend "
            f"{FlashAttn4.name}, which needs no activation"
        )
    return warnings


def values_taken() -> int | None:
    """How many values PyTorch unpacks from flash-attn-4's forward function; None if any number, or unknown."""
    caller = getattr(getattr(torch.nn.attention, "_fa4", None), "_fa4_run_forward", None)
    for node in _nodes(caller):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and _FORWARD in ast.unparse(node.value.func)
        ):
            target = node.targets[0]
            if isinstance(target, ast.Tuple) and not any(isinstance(item, ast.Starred) for item in target.elts):
                return len(target.elts)
    return None


def values_returned(function: Callable[..., Any]) -> int | None:
    """How many values a function returns, judging by its last ``return`` statement; None if that does not tell."""
    returns = [node.value for node in _nodes(function) if isinstance(node, ast.Return)]
    last = max(returns, key=lambda value: value.lineno if value is not None else 0, default=None)
    return len(last.elts) if isinstance(last, ast.Tuple) else None


def _nodes(function: Callable[..., Any] | None) -> list[ast.AST]:
    """The syntax tree nodes of a function; empty if its source cannot be read."""
    try:
        return list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return []
