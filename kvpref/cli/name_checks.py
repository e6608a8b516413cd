"""Names and choices among given settings, checked before torch is imported."""

from __future__ import annotations

from collections.abc import Callable

from kvpref.cli.choices import read_choice
from kvpref.cli.declared_names import loss_settings, losses, training_arguments, values_of
from kvpref.cli.given_settings import LOSS_ARG, OWN_NAMES, Given, Settings
from kvpref.cli.nearest import did_you_mean, nearest
from kvpref.cli.other_names import INSTEAD, SAME, WITHOUT_EFFECT
from kvpref.errors import InputError


def check_names(given: Settings, *, loss: str | None) -> None:
    """Refuse what no run has.

    Args:
        given: Settings by name.
        loss: The loss of the run; None if it is not known yet, or the user's own.

    Raises:
        InputError: For the first setting with an unknown name, or a value out of a short list that is not on it.
    """
    for name, item in given.items():
        if name.startswith(LOSS_ARG):
            if loss is not None and loss in losses():
                check_loss_setting(name.removeprefix(LOSS_ARG), loss, item.where)
        else:
            check_setting(name, item.where)
            if name == "loss" and isinstance(item.value, str):
                check_loss_name(item.value, item.where)
            read_choice(name, item.value, item.where)
            _check_member(name, item)


def _check_member(name: str, given: Given) -> None:
    values = values_of(name)
    if values and isinstance(given.value, str) and given.value not in values:
        near = did_you_mean(given.value, values)
        raise InputError(f"{given.where}: expected one of {', '.join(values)}; got {given.value!r}{near}")


def check_setting(name: str, where: str) -> None:
    """Raise InputError unless a setting has this name and an effect."""
    if name in WITHOUT_EFFECT:
        raise InputError(f"{where}: has no effect in kvpref train; {WITHOUT_EFFECT[name]}")
    if name not in OWN_NAMES and name not in training_arguments():
        raise InputError(f"{where}: there is no setting {name!r}{advice(name)}")


def advice(name: str, spell: Callable[[str], str] = str) -> str:
    """The end of a message about a setting that does not exist: what to give in its place.

    Args:
        name: Of the setting.
        spell: How the message calls a setting.
    """
    if name in INSTEAD:
        instead, note = INSTEAD[name]
        return f"; did you mean {spell(instead)}?" + (f" {note}" if note else "")
    if is_loss_setting(name):
        return f"; it is a setting of the loss: --loss-arg {name}=VALUE, in a file loss_args: {{{name}: VALUE}}"
    near = nearest(name, [*OWN_NAMES, *training_arguments(), *SAME])
    if near is None:
        return "; kvpref train --help lists the options, kvpref.PreferenceTrainingArguments all others"
    return f"; did you mean {spell(near)}?"


def is_loss_setting(name: str) -> bool:
    """Whether any built-in loss has this setting."""
    return any(name in loss_settings(loss) for loss in losses())


def check_loss_setting(name: str, loss: str, where: str) -> None:
    """Raise InputError unless a built-in loss has this setting."""
    own = loss_settings(loss)
    if name not in own:
        hint = did_you_mean(name, own) or ";"
        raise InputError(f"{where}: loss {loss!r} has no setting {name!r}{hint} it has: {', '.join(own) or 'none'}")


def known_loss(name: str | None) -> str | None:
    """A callback of Typer that refuses a loss that is not there."""
    if name is not None:
        check_loss_name(name, "--loss")
    return name


def check_loss_name(name: str, where: str) -> None:
    """Refuse a loss that is not there.

    Raises:
        InputError: If it is none of the built-in or installed losses, nor in a file or module.
    """
    if name in losses() or ":" in name or name.endswith(".py"):
        return
    from importlib.metadata import entry_points

    installed = [point.name for point in entry_points(group="kvpref.losses")]
    if name in installed:
        return
    known = [*losses(), *installed]
    near = nearest(name, known)
    which = f"choose from: {', '.join(known)}" if near is None else f"did you mean {near}? `kvpref losses` lists all"
    raise InputError(f"{where}: unknown loss {name!r}; {which}; one of yours is given as FILE.py:FUNCTION")
