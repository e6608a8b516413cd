"""`kvpref losses`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpref.cli.name_checks import check_loss_name
from kvpref.errors import InputError

if TYPE_CHECKING:
    from kvpref.losses.catalog import LossDescription, Setting

_REFERENCE = {True: "yes", False: "no"}


def losses(
    name: Annotated[
        str | None, typer.Argument(help="One loss, in full: a name of the list, or FILE.py:FUNCTION.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on the last line of stdout.")] = False,
) -> None:
    """List the losses that `kvpref train --loss` knows, or print what one of them computes.

    Each with what it is a mean over (its unit), whether it reads reference log-probs, and its settings (--loss-arg)
    with their defaults; a setting without default shows as NAME=?.

    Example: kvpref losses dpo
    """
    if name is not None:
        check_loss_name(name, "kvpref losses")
    from kvpref.losses import LOSSES
    from kvpref.losses.catalog import describe_loss
    from kvpref.losses.user import find_loss, installed_losses

    if name is not None:
        described = describe_loss(name, LOSSES[name] if name in LOSSES else find_loss(name, LOSSES))
        _print_loss(described)
        if json_:
            print(json.dumps(_as_json(described)))
        return
    found = [describe_loss(known, target) for known, target in LOSSES.items()]
    broken: dict[str, str] = {}
    for installed in installed_losses():
        try:
            found.append(describe_loss(installed, find_loss(installed, LOSSES)))
        except InputError as error:
            broken[installed] = str(error)
    _print_list(found, broken)
    if json_:
        print(json.dumps({"losses": [_as_json(described) for described in found], "broken": broken}))


def _print_list(found: list[LossDescription], broken: dict[str, str]) -> None:
    width = max(len(item.name) for item in found)
    for item in found:
        settings = " ".join(_assignment(setting) for setting in item.settings)
        print(f"{item.name:<{width}}  {item.summary}")
        print(f"{'':<{width}}  mean over {item.unit}; reference: {_reference(item)}; settings: {settings or 'none'}")
    for name, reason in broken.items():
        print(f"{name} cannot be used: {reason}")


def _print_loss(item: LossDescription) -> None:
    print(f"{item.name}: mean over {item.unit}; reference log-probs: {_reference(item)}; reads {item.reads}\n")
    print(item.explanation or "(no docstring)")
    print(f"\n{_learning_rates(item)}")
    if item.settings:
        print("\nSettings (--loss-arg NAME=VALUE):")
    for setting in item.settings:
        print(f"  {_assignment(setting)}" + (f"  {setting.explanation}" if setting.explanation else ""))


def _learning_rates(item: LossDescription) -> str:
    rates = item.learning_rates
    if isinstance(rates, str):
        return f"Learning rate, where none is given: {rates}"
    return (
        f"Learning rate, where none is given: {rates.full:g}; {rates.adapter:g} where only an adapter is trained\n"
        f"  Source: {rates.source}"
    )


def _assignment(setting: Setting) -> str:
    return f"{setting.name}=?" if setting.required else f"{setting.name}={setting.default}"


def _reference(item: LossDescription) -> str:
    return item.needs_reference if isinstance(item.needs_reference, str) else _REFERENCE[item.needs_reference]


def _as_json(item: LossDescription) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(item), default=str))
    return values | {"summary": item.summary}
