"""The `kvpref` app and its exit codes.

0 ok, 1 a run that failed, 2 bad usage or bad input, 130 stopped by Ctrl-C (143 by SIGTERM), as shells count signals.
"""

from __future__ import annotations

import errno
import os
import sys

import typer

from kvpref.cli import bench, check, data, demo, doctor, losses, plan, profile, score, train
from kvpref.cli.ctrl_c import ctrl_c_says
from kvpref.errors import InputError, Interrupted, RunError
from kvpref.ranks import refuse_many

app = typer.Typer(
    name="kvpref",
    help="Preference training that encodes each shared prompt once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("score")(score.score)
app.command("losses")(losses.losses)
app.command("check")(check.check)
app.add_typer(data.app, name="data")
app.add_typer(profile.app, name="profile")
app.command("plan")(plan.plan)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


_ONE_PROCESS = frozenset({"score", "check", "profile", "bench", "demo"})
"""Commands that each of several processes would run from beginning to end, writing the same files."""


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    show: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if context.invoked_subcommand in _ONE_PROCESS:
        refuse_many(f"kvpref {context.invoked_subcommand}")
    if show:
        from kvpref import __version__

        print(__version__)
        raise typer.Exit


_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM)


def main() -> None:
    """Run the app; turn kvpref's own errors into one line on stderr and an exit code."""
    try:
        with ctrl_c_says("by Ctrl-C"):
            app()
    except InputError as error:
        _fail(str(error), code=2)
    except RunError as error:
        _fail(str(error), code=1)
    except Interrupted as error:
        if os.environ.get("RANK", "0") == "0":  # all ranks stop together
            print(f"stopped {error}", file=sys.stderr)
        sys.exit(128 + error.signal_number)
    except OSError as error:
        if error.errno not in _WRITE_ERRORS:
            raise
        where = "" if error.filename is None else f" {error.filename}"
        _fail(f"cannot write{where}: {error.strerror}; what was saved before is intact", code=1)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
