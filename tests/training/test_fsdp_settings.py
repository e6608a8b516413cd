"""What is taken of FSDP's settings, from the arguments and from `accelerate launch`."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.training_args import ParallelMode

from kvpref import InputError
from kvpref.training.fsdp_settings import settle_fsdp


def arguments(plugin: dict[str, Any] | None = None, **settings: Any) -> Any:
    return SimpleNamespace(
        **{
            "fsdp": plugin is not None,
            "fsdp_config": {},
            "fsdp_plugin_args": plugin,
            "parallel_mode": ParallelMode.DISTRIBUTED,
            "save_only_model": False,
            "push_to_hub": False,
            "checkpoint": "none",
            **settings,
        }
    )


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_ACTIVATION_CHECKPOINTING", "ACCELERATE_USE_FSDP"):
        monkeypatch.setenv(name, "")


def test_checkpoints_are_sharded_unless_something_else_is_asked_for() -> None:
    plugin: dict[str, Any] = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}
    settle_fsdp(arguments(plugin))
    assert plugin["state_dict_type"] == "SHARDED_STATE_DICT"
    plugin["state_dict_type"] = "FULL_STATE_DICT"
    settle_fsdp(arguments(plugin, fsdp_config={"state_dict_type": "FULL_STATE_DICT"}))
    assert plugin["state_dict_type"] == "FULL_STATE_DICT"
    settle_fsdp(arguments(plugin, save_only_model=True))
    assert plugin["state_dict_type"] == "FULL_STATE_DICT", "transformers saves the model alone only in full"


def test_checkpointing_of_fsdp_becomes_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = {"fsdp_version": 2, "activation_checkpointing": True, "cpu_ram_efficient_loading": True}
    args = arguments(plugin)
    settle_fsdp(args)
    assert args.checkpoint == "all"
    assert not plugin["activation_checkpointing"]
    assert not plugin["cpu_ram_efficient_loading"]
    for name, value in {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }.items():
        monkeypatch.setenv(name, value)
    args = arguments()
    settle_fsdp(args)
    assert args.checkpoint == "all"
    assert os.environ["FSDP_ACTIVATION_CHECKPOINTING"] == os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.mark.parametrize(
    ("plugin", "settings", "message"),
    [
        ({"fsdp_version": 1}, {}, "FSDP version 1 is not supported.*set version to 2"),
        ({"fsdp_version": 2, "cpu_offload": True}, {}, "cpu_offload is not proved"),
        ({"fsdp_version": 2, "activation_checkpointing_offload": True}, {}, "activation_checkpointing_offload"),
        ({"fsdp_version": 2}, {"parallel_mode": ParallelMode.NOT_DISTRIBUTED}, "needs several processes"),
        ({"fsdp_version": 2}, {"fsdp_config": {"xla": True}}, "TPUs"),
    ],
)
def test_what_is_refused(plugin: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settle_fsdp(arguments(plugin, **settings))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "FSDP version 1 is not supported.*fsdp_version: 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "cpu_offload is not proved"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, "activation_checkpointing_offload"),
    ],
)
def test_what_is_refused_to_the_launcher(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        settle_fsdp(arguments())


def test_nothing_is_done_without_fsdp() -> None:
    args = arguments(parallel_mode=ParallelMode.NOT_DISTRIBUTED)
    settle_fsdp(args)
    assert args.checkpoint == "none"
