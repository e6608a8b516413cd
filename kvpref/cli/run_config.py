"""One training run as the command line or a YAML file describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from kvpref.atomic_files import write_text
from kvpref.cli.given_data import GivenData
from kvpref.cli.source_paths import absolute_sources
from kvpref.errors import InputError

RUN_FILE = "run.yaml"

SOURCES = frozenset({"model", "model_config", "tokenizer", "data", "eval_data", "output", "loss", "reference_model"})
"""The settings that name files or folders of this machine, or things on a hub."""


SECRETS = frozenset({"hub_token"})
"""What is not written to a file."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that `kvpref train` needs to repeat a run; saved as ``run.yaml`` beside the model."""

    model: str | None = None
    """Folder or hub name of the model to start from."""

    model_config: str | None = None
    """JSON model configuration to start from random weights instead."""

    tokenizer: str | None = None
    """Folder or hub name; default: the model's own."""

    data: list[str] | str | None = None
    """Training data: files, folders, patterns or hub names; one or several, kept as a list."""

    split: str | None = None
    """Which split or slice of the training data is read."""

    column_names: dict[str, str] | None = None
    """By the name of a column that is read, the name that it has in the data."""

    data_weights: list[float] | None = None
    """One per source of the training data: what share of an epoch it gives."""

    eval_data: str | None = None
    """Evaluation data, in the same forms."""

    output: str | None = None
    """Folder for checkpoints, metrics and the final model."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Dtype of the weights."""

    max_prompt_tokens: int | None = None
    """Keep the end of longer prompts."""

    max_response_tokens: int | None = None
    """Keep the start of longer responses."""

    max_image_pixels: int | None = None
    """Scale down larger images before the model's processor sees them."""

    on_bad_row: Literal["stop", "skip"] = "stop"
    """stop or skip."""

    group_by: str | None = None
    """The column whose rows make one group, where a row holds one response."""

    trajectory_groups: Literal["task", "turn"] = "task"
    """What makes a group of trajectories: the attempts at a task, or the answers to one history."""

    lora_r: int | None = None
    """Train a LoRA adapter of this rank instead of the weights."""

    lora_alpha: float | None = None
    """LoRA's scale is this over the rank; default: twice the rank."""

    lora_target_modules: str | None = None
    """Names of the modules that get LoRA weights, separated by commas; default: all linear ones of the text."""

    early_stopping_patience: int | None = None
    """Stop after so many evaluations in a row without a better one; the best model is kept."""

    accelerate_config: str | None = None
    """How several processes share the work: ddp, fsdp2, zero1, zero2, zero3, or a file of accelerate's."""

    training: dict[str, Any] = field(default_factory=dict)
    """Any field of `kvpref.PreferenceTrainingArguments`."""

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            object.__setattr__(self, "data", [self.data])
        if self.data_weights is not None and len(self.data_weights) != len(self.data or ()):
            raise InputError(
                f"data_weights takes one per DATA: got {len(self.data_weights)} for {len(self.data or ())}"
            )
        if self.lora_r is None and (self.lora_alpha is not None or self.lora_target_modules is not None):
            raise InputError("lora_alpha and lora_target_modules describe an adapter; give its rank, lora_r, too")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RunConfig:
        """The run that settings describe: fields of this class, training arguments and ``loss_args.NAME``, all flat."""
        names = {item.name for item in fields(cls)}
        own = {name: value for name, value in values.items() if name in names}
        training = {name: value for name, value in values.items() if name not in names and "." not in name}
        loss_args = {name.partition(".")[2]: value for name, value in values.items() if "." in name}
        return cls(**own, training=training | ({"loss_args": loss_args} if loss_args else {}))

    def flat(self) -> dict[str, Any]:
        """The inverse of `of`."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "training"}
        training = dict(self.training)
        loss_args = training.pop("loss_args", None) or {}
        return own | training | {f"loss_args.{name}": value for name, value in loss_args.items()}

    def given_data(self) -> dict[str, GivenData]:
        """The training data and, where there is any, the evaluation data, by their names."""
        weights = None if self.data_weights is None else tuple(self.data_weights)
        names = self.column_names or {}
        sources = tuple([self.data] if isinstance(self.data, str) else self.data or ())
        train = GivenData(
            sources=sources, split=self.split, column_names=names, weights=weights, group_by=self.group_by
        )
        if self.eval_data is None:
            return {"data": train}
        return {
            "data": train,
            "eval_data": GivenData(sources=(self.eval_data,), column_names=names, group_by=self.group_by),
        }

    def require(self, *names: str) -> None:
        """Raise InputError if one of these is missing."""
        for name in names:
            if not getattr(self, name):
                raise InputError(f"{name} is missing; give it on the command line or in --config")

    def with_absolute_paths(self) -> RunConfig:
        """The same run with its paths as they are found from any folder."""
        given = {name: value for name, value in self.flat().items() if name in SOURCES and value}
        if ":" not in given.get("loss", ":"):
            del given["loss"]  # a name, even where a folder is called the same, as in `--loss dpo --output dpo`
        return RunConfig.of(self.flat() | {name: absolute_sources(value) for name, value in given.items()})

    def save(self, path: Path) -> None:
        """Write it as YAML, without secrets; a run that is killed meanwhile leaves what was there."""
        import yaml

        values = asdict(self.with_absolute_paths())
        values["training"] = {name: value for name, value in values["training"].items() if name not in SECRETS}
        write_text(path, yaml.safe_dump(values, sort_keys=False))


def sources_of(values: Mapping[str, Any]) -> list[str]:
    """The files, folders and names of hubs that a run reads.

    Args:
        values: Its settings, in the form `RunConfig.of` takes.
    """
    given = [
        value
        for name, value in values.items()
        if name in SOURCES - {"output"} and (name != "loss" or ":" in str(value))
    ]
    return [str(source) for value in given for source in (value if isinstance(value, list) else [value]) if source]
