"""`kvpref check`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpref.cli.options import DEFAULT_DTYPE, DEFAULT_MODE, DTYPE, JSON, MODE, MODEL_CONFIG
from kvpref.errors import InputError, RunError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check(
    model: Annotated[str | None, typer.Argument(help="Folder or hub name; leave out with --model-config.")] = None,
    model_config: Annotated[str | None, MODEL_CONFIG] = None,
    numeric: Annotated[
        bool, typer.Option("--numeric", help="Compare log-probs and gradients with the naive forward.")
    ] = False,
    mode: Annotated[str, MODE] = DEFAULT_MODE,
    dtype: Annotated[str, DTYPE] = DEFAULT_DTYPE,
    json_: Annotated[bool, JSON] = False,
) -> None:
    """Say whether a model is supported, and with --numeric prove it on that very model.

    Without --numeric only the configuration is read: no weights are loaded, and passes run on tensors without data to
    find out what each layer does. --mode and --dtype go with --numeric.

    Example: kvpref check ./llama --numeric
    """
    if (model is None) == (model_config is None):
        raise InputError("name either MODEL (a folder or hub name) or --model-config FILE.json")
    result = (
        _check_numeric(model, model_config, mode, dtype)
        if numeric
        else _check_architecture(model or model_config or "")
    )
    if json_:
        print(json.dumps(result))


def _check_architecture(source: str) -> dict[str, Any]:
    import torch
    from rich.console import Console

    from kvpref.cli.adapters import is_adapter, put_on, read_adapter
    from kvpref.cli.check_layers import find_layers
    from kvpref.cli.loading import load_config
    from kvpref.models.attach import attach
    from kvpref.models.classes import model_class
    from kvpref.models.support import check_config

    adapter = read_adapter(source) if is_adapter(source) else None
    settings = load_config(source if adapter is None else adapter.base_model_name_or_path)
    check_config(settings)  # before building: a model of another family may not even build
    is_reward = adapter is not None and adapter.task_type == "SEQ_CLS"
    if is_reward:
        settings.num_labels = 1
    kind = model_class(settings, "ends" if is_reward else "tokens")
    try:
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(settings)
            attach(model if adapter is None else put_on(model, adapter))
    except UnsupportedModelError:
        raise
    except ValueError as error:
        raise InputError(f"{source}: {settings.model_type!r} has no causal language model: {error}") from error
    num_layers = settings.get_text_config(decoder=True).num_hidden_layers
    described = f"{settings.model_type}, {num_layers} layers"
    result: dict[str, Any] = {"model": source, "supported": True, "model_type": settings.model_type}
    if adapter is not None:
        described += f", {adapter.peft_type.value} adapter on {adapter.base_model_name_or_path}"
        result["base_model"] = adapter.base_model_name_or_path
    else:
        found = find_layers(settings)
        _print_layers(source, found)
        result |= found
    Console().print(f"{source}: supported ({described})", highlight=False)
    return result


def _print_layers(source: str, found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{source}: what a pass found", title_justify="left")
    rows = found["layers"]
    columns = [name for name in rows[0] if name == "layers" or any(row[name] for row in rows)]
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in columns))
    Console().print(table)
    Console().print(f"head: {found['head']}", highlight=False)


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return "\n".join(value)
    return {True: "yes", False: "", None: ""}.get(value, str(value))


def _check_numeric(source: str | None, config: str | None, mode: str, dtype: str) -> dict[str, Any]:
    from rich.console import Console
    from rich.table import Table

    from kvpref.cli.adapters import is_adapter, read_adapter
    from kvpref.cli.check_pictures import picture_groups
    from kvpref.cli.loading import load_model
    from kvpref.engine.verification import compare_with_naive

    if source is not None and is_adapter(source) and read_adapter(source).task_type == "SEQ_CLS":
        raise InputError(
            f"{source}: --numeric compares log-probs, and this is the adapter of a reward model; leave --numeric out"
        )
    model = load_model(source, config, dtype=dtype)
    groups = picture_groups(source, model)
    errors = compare_with_naive(model, mode=mode, groups=groups)
    given = ", pictures included" if groups else ""
    table = Table(title=f"{source or config}: {mode} against each sequence alone{given}", title_justify="left")
    for column in ("what", "largest error", "explained by rounding"):
        table.add_column(column)
    table.add_row("token log-probs (nats)", f"{errors.max_logp_error:.2e}", f"up to {errors.logp_tolerance:.0e}")
    table.add_row(
        f"gradients (relative; {errors.worst_parameter})",
        f"{errors.max_gradient_error:.2e}",
        f"up to {errors.gradient_tolerance:.0e}",
    )
    Console().print(table)
    if not errors.within_tolerance:
        raise RunError(f"{source or config}: mode {mode!r} differs from the naive forward by more than rounding")
    return {"model": source or config, "mode": mode, "supported": True, "pictures": bool(groups), **asdict(errors)}
