"""The words of a command line, as users of transformers and TRL may write them, in the options that commands have.

``--learning_rate`` is ``--learning-rate``, ``--num-train-epochs`` the option ``--epochs``, and a training argument
without option of its own, ``--weight-decay 0.1``, becomes ``--set weight_decay=0.1``. What is unknown is answered with
the nearest that there is, before torch is imported.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from kvpref.cli.declared_names import training_arguments
from kvpref.cli.given_settings import option_name
from kvpref.cli.name_checks import advice, check_setting, is_loss_setting
from kvpref.cli.nearest import did_you_mean, nearest
from kvpref.cli.other_names import INSTEAD, SAME, SHORT_OPTIONS
from kvpref.errors import InputError

_HELP = ("-h", "--help")
_TRUE, _FALSE = ("true", "True"), ("false", "False")
_SHORT_OF = {setting: option for option, setting in SHORT_OPTIONS.items()}


def read_words(app: Any, words: list[str]) -> list[str]:
    """The words with every option spelt as its command spells it.

    Args:
        app: The whole command line, as Typer makes it.
        words: What follows the program's name.

    Raises:
        InputError: For a command or an option that there is not.
    """
    command, path = app, ["kvpref"]
    place = 0
    while hasattr(command, "commands") and place < len(words):
        word = words[place]
        if word.startswith("-"):
            if word not in _options(command):
                raise InputError(f"{' '.join(path)}: there is no option {word}{did_you_mean(word, _options(command))}")
        elif word not in command.commands:
            known = ", ".join(command.commands)
            near = did_you_mean(word, command.commands)
            raise InputError(f"{' '.join(path)}: there is no command {word!r}{near or f'; choose from: {known}'}")
        else:
            command = command.commands[word]
            path.append(word)
        place += 1
    if hasattr(command, "commands"):
        return words
    return [*words[:place], *_read_options(command, " ".join(path), deque(words[place:]))]


def _options(command: Any) -> Mapping[str, Any]:
    """The options of a command by each of their spellings; None for help."""
    found: dict[str, Any] = dict.fromkeys(_HELP)
    for option in command.params:
        if option.param_type_name == "option":
            found |= dict.fromkeys([*option.opts, *option.secondary_opts], option)
    return found


def _read_options(command: Any, path: str, words: deque[str]) -> Iterator[str]:
    options = _options(command)
    while words:
        word = words.popleft()
        if word == "--":
            yield from (word, *words)
            return
        if not word.startswith("--"):
            yield word
            continue
        name, equals, value = word.partition("=")
        name = _spelling(name, options)
        if name not in options:
            if "--set" not in options:
                raise InputError(f"{path}: there is no option {name}{_nearest_option(name, command)}")
            yield from _as_assignment(name, [value] if equals else [], options, path, words)
        elif options[name] is None or not options[name].is_flag:
            yield name + equals + value
            if options[name] is not None and not equals and words:
                yield words.popleft()
        else:
            yield from _read_flag(name, options, words)


def _spelling(name: str, options: Mapping[str, Any]) -> str:
    """The option that a name stands for, or the name with hyphens if none does."""
    if name in options:
        return name
    key = name[2:].replace("-", "_")
    for other in (key, SAME.get(key, key), _SHORT_OF.get(key, key)):
        option = "--" + other.replace("_", "-")
        if option in options:
            return option
    return "--" + key.replace("_", "-")


def _read_flag(name: str, options: Mapping[str, Any], words: deque[str]) -> Iterator[str]:
    """A flag, which others give a value: ``--bf16 true``."""
    if not words or words[0] not in (*_TRUE, *_FALSE) or words.popleft() in _TRUE:
        yield name
    elif options[name].secondary_opts:
        yield options[name].secondary_opts[0]
    elif "--set" in options and options[name].name in training_arguments():
        yield from ("--set", f"{options[name].name}=false")


def _as_assignment(
    option: str, value: list[str], options: Mapping[str, Any], path: str, words: deque[str]
) -> Iterator[str]:
    """``--set NAME=VALUE`` for a training argument without option of its own."""
    name, known = option[2:].replace("-", "_"), training_arguments()
    if name.startswith("no_") and "bool" in known.get(name[3:], ""):
        yield from ("--set", f"{name[3:]}=false")
        return
    if name not in known:
        raise InputError(f"{path}: there is no option {option}{_nearest_spelling(option, options)}")
    check_setting(name, option)
    kinds = set(known[name].split(" | ")) - {"None"}
    if not value:
        is_value = bool(words) and (kinds != {"bool"} or words[0] in (*_TRUE, *_FALSE))
        if not is_value and "bool" not in kinds:
            raise InputError(f"{option}: expected a value")
        value = [words.popleft() if is_value else "true"]
    # What is declared as text stays as it is written: 2024-01-01 is no date.
    yield from ("--set", f"{name}={json.dumps(value[0]) if kinds == {'str'} else value[0]}")


def _nearest_option(option: str, command: Any) -> str:
    positions = [item.name.upper() for item in command.params if item.param_type_name == "argument"]
    setting = SAME.get(option[2:].replace("-", "_"), "").upper()
    if setting in positions:
        return f"; give {setting} by its position: {' '.join(positions)}"
    return did_you_mean(option, _options(command))


def _nearest_spelling(option: str, options: Mapping[str, Any]) -> str:
    name = option[2:].replace("-", "_")
    near = nearest(option, [*options, *("--" + key.replace("_", "-") for key in training_arguments())])
    known = name in INSTEAD or is_loss_setting(name) or near is None
    return advice(name, option_name) if known else f"; did you mean {near}?"
