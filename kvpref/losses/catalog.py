"""What a loss is, what it needs and its settings, read from its code; for people who choose one."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import MISSING, dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any

from kvpref.errors import InputError
from kvpref.losses.interface import PreferenceLoss
from kvpref.losses.learning_rates import UNKNOWN_RATES, LearningRates
from kvpref.losses.user import construct_loss, settings_of

VARIES = "by settings"
"""Stands for a value that depends on settings without a default."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a loss."""

    name: str
    """What ``--loss-arg`` and `make_loss` call it."""

    default: Any
    """Its default; None if it is required."""

    required: bool
    """Whether the loss cannot be made without it."""

    explanation: str
    """The docstring under the field, in one line; empty if there is none."""


@dataclass(frozen=True, kw_only=True)
class LossDescription:
    """A loss as described to users."""

    name: str
    """What ``--loss`` and `make_loss` call it."""

    explanation: str
    """Its whole docstring."""

    unit: str
    """What it is a mean over."""

    needs_reference: bool | str
    """Whether it reads a reference's log-probs, or `VARIES`."""

    reads: str
    """``tokens``: log-probs. ``ends``: rewards of a model with a scalar head."""

    learning_rates: LearningRates | str
    """The learning rates used by default, or `VARIES`."""

    settings: tuple[Setting, ...]
    """The settings, in the order in which the loss declares them."""

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return self.explanation.partition("\n")[0]


def describe_loss(name: str, target: Any) -> LossDescription:
    """Describe a loss.

    Args:
        name: What users call it.
        target: A subclass of `PreferenceLoss`, an instance of one, or a function.

    Raises:
        InputError: If it is not a loss.
    """
    settings = () if isinstance(target, PreferenceLoss) else tuple(_settings(target))
    made = None
    if not any(setting.required for setting in settings):
        made = construct_loss(name, target, {})
    facts = target if made is None else made
    return LossDescription(
        name=name,
        explanation=inspect.getdoc(target) or "",
        unit=_fact(facts, "unit", "groups"),
        needs_reference=_fact(facts, "needs_reference", False),
        reads=_fact(facts, "reads", "tokens"),
        learning_rates=_fact(facts, "learning_rates", UNKNOWN_RATES),
        settings=settings,
    )


def _fact(target: Any, name: str, default: Any) -> Any:
    value = getattr(target, name, default)
    return VARIES if isinstance(value, property) else value


def _settings(target: Any) -> list[Setting]:
    if not callable(target):
        raise InputError(f"{target!r:.60} is not a loss")
    explained = _explanations(target) if isinstance(target, type) else {}
    factories = {item.name: item.default_factory for item in fields(target)} if is_dataclass(target) else {}
    found = []
    for parameter in settings_of(target):
        factory = factories.get(parameter.name, MISSING)
        default = parameter.default if factory is MISSING else factory()
        required = default is parameter.empty
        found.append(
            Setting(
                name=parameter.name,
                default=None if required else default,
                required=required,
                explanation=explained.get(parameter.name, ""),
            )
        )
    return found


def _explanations(kind: type) -> dict[str, str]:
    """The docstrings under the fields of a class and its bases; Python does not keep them, so the source is read."""
    explained: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue  # made without source, such as in an interactive interpreter
        (definition,) = tree.body
        body = getattr(definition, "body", [])
        for item, following in pairwise(body):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and _is_text(following):
                explained[item.target.id] = " ".join(following.value.value.split())
    return explained


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
