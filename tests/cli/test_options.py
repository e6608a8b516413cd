"""Options over all commands: every default is shown, and one name means one thing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import typer

from kvpref.cli.app import app
from kvpref.cli.given_settings import option_name
from kvpref.cli.run_config import RunConfig
from kvpref.cli.training_settings import with_defaults
from kvpref.data.batching.budgets import DEFAULT_MAX_TOKENS, default_budget
from kvpref.data.batching.lengths import measure_group
from kvpref.records.groups import Group, Sequence
from kvpref.training import PreferenceTrainingArguments

OWN_DEFAULTS = {
    "--output": "each command writes something else",
    "--seed": "the demonstration's figures are those of its own seed",
    "--loss": "profile memory takes groups of any size, which dpo does not",
    "--num-responses": "plan predicts for a number of responses, profile memory cuts groups down to some",
    "--tokenizer": "data inspect has no model to take one from",
    **dict.fromkeys(
        ("--max-prompt-tokens", "--max-response-tokens", "--max-image-pixels"),
        "eval cuts sequences as the run did that made the model",
    ),
}
"""Options whose default differs between commands, and why."""


def commands() -> Iterator[tuple[str, Any]]:
    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        for own, inner in getattr(command, "commands", {}).items():
            yield from walk(f"{name} {own}".strip(), inner)
        if not hasattr(command, "commands"):
            yield name, command

    yield from walk("", typer.main.get_command(app))


def options() -> Iterator[tuple[str, Any]]:
    for name, command in commands():
        for option in command.params:
            if option.param_type_name == "option" and not option.is_eager and option.name != "help":
                yield name, option


ALL = [pytest.param(command, option, id=f"{command} {option.opts[0]}") for command, option in options()]


def is_flag(option: Any) -> bool:
    return option.is_flag and not option.secondary_opts and option.default is False


def shown_default(option: Any) -> str | None:
    """The default that --help prints, without what brackets it."""
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return option.show_default
    return str(option.default) if option.show_default and option.default is not None else None


@pytest.mark.parametrize(("command", "option"), ALL)
def test_help_shows_the_default(command: str, option: Any) -> None:
    assert is_flag(option) or shown_default(option), f"{command}: {option.opts[0]} shows no default"
    if isinstance(option.show_default, str) and option.default is not None and not option.required:
        assert option.show_default == str(option.default)
    assert option.help


def test_there_are_commands() -> None:
    assert {name for name, _ in commands()} >= {"train", "score", "bench", "plan", "check", "data inspect"}


def test_one_name_means_one_thing_with_one_default() -> None:
    defaults: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for command, option in options():
        defaults[option.opts[0]][shown_default(option)].append(command)
    differing = {name: dict(found) for name, found in defaults.items() if len(found) > 1 and name not in OWN_DEFAULTS}
    assert not differing
    names = {"--lora-r", "--lora-target-modules", "--max-tokens", "--batch-size", "--dtype"}
    assert names <= defaults.keys()
    others = {"--lora-rank", "--lora-targets", "--groups", "--groups-per-step", "--max-tokens-per-micro-batch"}
    assert not others & defaults.keys()


def test_the_defaults_of_train_are_those_shown() -> None:
    (train,) = (command for name, command in commands() if name == "train")
    shown = {option.opts[0]: shown_default(option) for option in train.params if option.param_type_name == "option"}
    values = {item.name: item.default for kind in (PreferenceTrainingArguments, RunConfig) for item in fields(kind)}
    values |= with_defaults(RunConfig()).training
    names = ["dtype", "on_bad_row", "loss", "mode", "per_device_train_batch_size", "seed", "schedule"]
    for name in [*names, "logging_steps", "save_steps", "prefix_cache", "checkpoint"]:
        assert shown[option_name(name)] == str(values[name]), name
    assert float(shown["--epochs"] or 0) == values["num_train_epochs"]


def test_a_budget_that_was_not_given_takes_the_largest_group() -> None:
    small = Group([Sequence.from_prompt_and_response([1, 2], [3])] * 2)
    large = Group([Sequence.from_prompt_and_response([1] * 9000, [index]) for index in range(2)])
    lengths = [measure_group(group) for group in (small, large)]
    assert default_budget(lengths[:1], "two_pass") == DEFAULT_MAX_TOKENS == 8192
    assert default_budget(lengths, "two_pass") == 9002
    assert default_budget(lengths, "packed") == default_budget(lengths, "padded") == 18002
