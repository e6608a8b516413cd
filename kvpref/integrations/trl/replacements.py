"""TRL's options that choose kernels: kvpref's run in their place, with a warning.

To replace another: a row in `REPLACEMENTS`; the tests run over it.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvpref.integrations.trl.setup import Setup, asks_fsdp
from kvpref.models.attention import ATTENTION_NAME, EAGER_NAME


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """One option that has no effect."""

    name: str
    """The option as the user writes it."""

    applies: Callable[[Setup], bool]
    """Whether a setup uses it."""

    runs: str
    """What runs instead."""

    without: Callable[[Any], dict[str, Any]]
    """From TRL's arguments to the ones to change so that the option is off."""


def without_replaced(setup: Setup) -> Any:
    """A copy of TRL's arguments without the replaced options, with a warning for each; the original is unchanged."""
    args: Any = setup.args
    for item in REPLACEMENTS:
        if item.applies(setup):
            message = f"kvpref's {setup.trainer} does not use {item.name}: {item.runs}"
            warnings.warn(message, stacklevel=3)
            changes, args = item.without(args), copy.copy(args)
            for name, value in changes.items():
                setattr(args, name, value)
    return args


def _without_attention(args: Any) -> dict[str, Any]:
    kept = {name: value for name, value in args.model_init_kwargs.items() if name != "attn_implementation"}
    return {"model_init_kwargs": kept}


def _loads_on_one_rank(setup: Setup) -> bool:
    return asks_fsdp(setup, "cpu_ram_efficient_loading", "FSDP_CPU_RAM_EFFICIENT_LOADING")


def _loading_on_every_rank(args: Any) -> dict[str, Any]:
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # read when models are loaded
    plugin = getattr(args, "fsdp_plugin_args", None)
    return {} if plugin is None else {"fsdp_plugin_args": {**plugin, "cpu_ram_efficient_loading": False}}


REPLACEMENTS: tuple[Replacement, ...] = (
    Replacement(
        name="use_liger_kernel=True",
        applies=lambda setup: bool(setup.option("use_liger_kernel")),
        runs="transformers' own layers and kvpref's fused LM head run instead",
        without=lambda args: {"use_liger_kernel": False},
    ),
    Replacement(
        name="model_init_kwargs={'attn_implementation': ...}",
        applies=lambda setup: (
            setup.loading_option("attn_implementation") not in (None, "sdpa", ATTENTION_NAME, EAGER_NAME)
        ),
        runs="kvpref's attention over shared prompts runs instead, and sdpa in generation",
        without=_without_attention,
    ),
    Replacement(
        name="FSDP's cpu_ram_efficient_loading",
        applies=_loads_on_one_rank,
        runs="every rank loads the weights, since kvpref looks at them before they are sharded",
        without=_loading_on_every_rank,
    ),
)
"""TRL's options in whose place kvpref's kernels run, with a warning."""
