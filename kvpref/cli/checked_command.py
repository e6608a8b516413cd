"""Commands whose parameters are checked against one another, and against what is there, before they import anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from kvpref.cli.given_settings import Given, option_name
from kvpref.cli.named_sources import check_sources, refuse_to_write_over
from kvpref.cli.precision import check_precision


class CheckedCommand(TyperCommand):
    """As typer's own; `kvpref train` checks its settings itself, which may also come from a file."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command, if what was given can be meant."""
        check_precision({name: Given(value, option_name(name)) for name, value in ctx.params.items()})
        check_sources(ctx.params)
        output = ctx.params.get("output")
        if isinstance(output, Path):
            refuse_to_write_over(output, ctx.params)
        return super().invoke(ctx)
