"""`kvpref profile`."""

from __future__ import annotations

import typer

from kvpref.cli import profile_memory, profile_time
from kvpref.cli.checked_command import CheckedCommand

app = typer.Typer(help="Where a training step's memory and time go.", no_args_is_help=True)
app.command("memory", cls=CheckedCommand)(profile_memory.memory)
app.command("time", cls=CheckedCommand)(profile_time.time)
