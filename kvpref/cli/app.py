"""The `kvpref` app and its exit codes.

0 ok, 1 a run that failed, 2 bad usage or bad input, 130 stopped by Ctrl-C (143 by SIGTERM), as shells count signals.
"""

from __future__ import annotations

import errno
import sys
import traceback
from typing import NoReturn

import typer

from kvpref.cli import bench, check, data, demo, doctor, evaluate, losses, plan, profile, score, train
from kvpref.cli.checked_command import CheckedCommand
from kvpref.cli.command_line import read_words
from kvpref.cli.ctrl_c import ctrl_c_says
from kvpref.cli.quiet import hide_library_noise, hide_profiler_noise
from kvpref.errors import InputError, Interrupted, RunError
from kvpref.ranks import is_one_of_many, refuse_many

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
app.command("eval", cls=CheckedCommand)(evaluate.evaluate)
app.command("score", cls=CheckedCommand)(score.score)
app.command("losses")(losses.losses)
app.command("check", cls=CheckedCommand)(check.check)
app.add_typer(data.app, name="data")
app.add_typer(profile.app, name="profile")
app.command("plan", cls=CheckedCommand)(plan.plan)
app.command("bench", cls=CheckedCommand)(bench.bench)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


_ONE_PROCESS = frozenset({"score", "check", "profile", "bench", "demo"})
"""Commands that each of several processes would run from beginning to end, writing the same files."""

_PROFILING = frozenset({"bench", "profile"})


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    show: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if context.invoked_subcommand in _ONE_PROCESS:
        refuse_many(f"kvpref {context.invoked_subcommand}")
    if context.invoked_subcommand in _PROFILING:
        hide_profiler_noise()
    if show:
        from kvpref import __version__

        print(__version__)
        raise typer.Exit


_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM)


def main() -> None:
    """Run the app; turn kvpref's own errors into one line on stderr and an exit code."""
    hide_library_noise()
    try:
        with ctrl_c_says("by Ctrl-C"):
            app(args=read_words(typer.main.get_command(app), sys.argv[1:]))
    except InputError as error:
        _fail(str(error), 2, error)
    except RunError as error:
        _fail(str(error), 1, error)
    except Interrupted as error:
        _stop(f"stopped {error}", 128 + error.signal_number)
    except OSError as error:
        if error.errno not in _WRITE_ERRORS:
            _fail_unknown(error)
        where = "" if error.filename is None else f" {error.filename}"
        _fail(f"cannot write{where}: {error.strerror}; what was saved before is intact", 1, error)
    except Exception as error:
        _fail_unknown(error)


def _fail(message: str, code: int, error: Exception) -> NoReturn:
    if is_one_of_many():
        from kvpref.parallel.failures import end_rank  # imports torch

        end_rank(message, code, error)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _fail_unknown(error: Exception) -> NoReturn:
    """For an error of ours, whose traceback says where: that of one rank will do."""
    if not is_one_of_many():
        raise error
    _fail("".join(traceback.format_exception(error)), 1, error)


def _stop(message: str, code: int) -> NoReturn:
    if is_one_of_many():
        from kvpref.parallel.failures import end_stopped

        end_stopped(message, code)
    print(message, file=sys.stderr)
    sys.exit(code)
