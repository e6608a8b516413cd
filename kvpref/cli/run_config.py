"""One training run as the command line or a YAML file describes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kvpref.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that `kvpref train` needs to repeat a run; saved as ``run.yaml`` beside the model."""

    model: str | None = None
    """Folder or hub name of the model to start from."""

    config: str | None = None
    """JSON model configuration to start from random weights instead."""

    tokenizer: str | None = None
    """Folder or hub name; default: the model's own."""

    data: str | None = None
    """Training data: .jsonl, .json, .parquet, or a dataset name."""

    eval_data: str | None = None
    """Evaluation data, in the same forms."""

    output: str | None = None
    """Folder for checkpoints, metrics and the final model."""

    dtype: str = "float32"
    """Dtype of the weights."""

    max_prompt_tokens: int | None = None
    """Keep the end of longer prompts."""

    max_response_tokens: int | None = None
    """Keep the start of longer responses."""

    on_bad_row: str = "stop"
    """stop or skip."""

    lora_r: int | None = None
    """Train a LoRA adapter of this rank instead of the weights."""

    lora_alpha: float | None = None
    """LoRA's scale is this over the rank; default: twice the rank."""

    lora_target_modules: str | None = None
    """Names of the modules that get LoRA weights, separated by commas; default: all linear layers."""

    training: dict[str, Any] = field(default_factory=dict)
    """Any field of `kvpref.PreferenceTrainingArguments`."""

    def __post_init__(self) -> None:
        if not isinstance(self.training, dict):
            raise InputError(f"training must be a mapping of training arguments; got {self.training!r}")
        if self.lora_r is None and (self.lora_alpha is not None or self.lora_target_modules is not None):
            raise InputError("lora_alpha and lora_target_modules describe an adapter; give its rank, lora_r, too")
        if self.lora_r is not None and self.lora_r < 1:
            raise InputError(f"lora_r must be at least 1; got {self.lora_r}")

    def merged(self, given: dict[str, Any], training: dict[str, Any], assigned: dict[str, Any]) -> RunConfig:
        """This configuration with what was given on the command line put over it.

        Args:
            given: Fields of this class; None for what was not given.
            training: Training arguments that have an option of their own; None or empty for what was not given.
            assigned: Those given with ``--set``.

        Raises:
            InputError: If one was given both ways.
        """
        own = {name: value for name, value in given.items() if value is not None}
        over = {name: value for name, value in training.items() if value not in (None, {})}
        twice = sorted(over.keys() & assigned.keys())
        if twice:
            raise InputError(f"--set {twice[0]}: this was given by its own option too; leave one of them out")
        over |= assigned
        loss_args = {**(self.training.get("loss_args") or {}), **(over.pop("loss_args", None) or {})}
        merged = {**self.training, **over}
        if loss_args:
            merged["loss_args"] = loss_args
        return replace(self, **own, training=merged)

    def require(self, *names: str) -> None:
        """Raise InputError if one of these is missing."""
        for name in names:
            if getattr(self, name) is None:
                raise InputError(f"{name} is missing; give it on the command line or in --config-file")

    def save(self, path: Path) -> None:
        import yaml

        path.write_text(yaml.safe_dump(asdict(self), sort_keys=False))


def read_run_config(path: str | None) -> RunConfig:
    """Read a YAML run configuration; an empty one if there is no path.

    Raises:
        InputError: If the file cannot be read, is not YAML, or has an unknown key.
    """
    import yaml

    if path is None:
        return RunConfig()
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the run configuration: {error}") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where is not None else ""
        raise InputError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    valid = [item.name for item in fields(RunConfig)]
    if not isinstance(values, dict):
        raise InputError(f"{path}:1: expected a mapping with keys among: {', '.join(valid)}")
    unknown = [key for key in values if key not in valid]
    if unknown:
        raise InputError(f"{path}: unknown key {unknown[0]!r}; valid keys: {', '.join(valid)}")
    return RunConfig(**values)


def parse_assignments(assignments: list[str], option: str) -> dict[str, Any]:
    """``["a=1", "b=x"]`` to ``{"a": 1, "b": "x"}``, values read as YAML.

    Raises:
        InputError: If one has no ``=`` or its value is not YAML.
    """
    import yaml

    parsed: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise InputError(f"{option} {assignment!r}: expected NAME=VALUE")
        try:
            parsed[name.strip().replace("-", "_")] = _number(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise InputError(f"{option} {assignment!r}: cannot read the value: {error}") from error
    return parsed


def _number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-4`` (no dot) as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
