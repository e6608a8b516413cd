"""`kvpref doctor`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from kvpref.profiling.backend_probe import BackendProbe
    from kvpref.profiling.environment import Device, Environment


def doctor(
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on the last line of stdout.")] = False,
) -> None:
    """Say which attention backends work on this machine, why the others do not, and what to install.

    Each that says it can runs a tiny forward and backward against the reference. Says what `auto` takes on each device,
    lists versions and devices, and warns of common problems. Exit code 1 if no fast backend works.

    Example: kvpref doctor
    """
    from rich.console import Console

    from kvpref.profiling.environment import inspect_environment

    environment = inspect_environment()
    console = Console()
    console.print(_backends_table(environment.backends))
    console.print(_devices_table(environment.devices))
    for line in _lines(environment):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if json_:
        print(json.dumps(environment.to_json()))
    if not environment.has_fast_backend:
        raise typer.Exit(1)


def _backends_table(backends: tuple[BackendProbe, ...]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Attention backends", title_justify="left")
    table.add_column("backend", no_wrap=True)
    for column in ("works", "largest relative error, or why it does not work"):
        table.add_column(column)
    for backend in backends:
        errors = ", ".join(f"{dtype} {error:.1e}" for dtype, error in backend.errors.items())
        cost = backend.cost if backend.works else None
        works = f"yes, on {backend.device}" if backend.works else "no"
        table.add_row(backend.name, works, escape("; ".join(filter(None, (errors, cost, backend.reason)))))
    return table


def _devices_table(devices: tuple[Device, ...]) -> Table:
    from rich.table import Table

    table = Table(title="Devices", title_justify="left")
    for column in ("kind", "name", "memory (GiB)", "compute capability"):
        table.add_column(column)
    for device in devices:
        memory = "" if device.memory_bytes is None else f"{device.memory_bytes / 2**30:.1f}"
        table.add_row(device.kind, device.name, memory, device.compute_capability or "")
    return table


def _lines(environment: Environment) -> list[str]:
    versions = [f"{name} {found}" for name, found in environment.packages.items() if found is not None]
    missing = [name for name, found in environment.packages.items() if found is None]
    lines = [
        f"versions: Python {environment.python}, {', '.join(versions)}",
        f"not installed: {', '.join(missing) or 'none of the optional packages is missing'}",
        *(f"auto on {choice.device} in {', '.join(choice.dtypes)}: {choice.takes}" for choice in environment.automatic),
        f"threads: {environment.num_threads} per operation, {environment.num_cpus} processors",
        *(f"warning: {warning}" for warning in environment.warnings),
    ]
    if not environment.has_fast_backend:
        lines.append("no fast attention backend works here: training would run on the slow reference")
    return lines
