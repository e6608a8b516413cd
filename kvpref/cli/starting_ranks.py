"""``--num-processes``: starts the ranks of a run on this machine, and ends all of them when one fails.

Each rank finds in its environment what torchrun would put there. The store through which ranks find one another is this
process's, so that it outlives every rank.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from kvpref.cli.accelerate_config import find_config, num_processes_of, read_config
from kvpref.cli.given_settings import Given
from kvpref.errors import InputError
from kvpref.ranks import num_started

_POLL_S = 0.05
_OTHERS_S = 10.0
"""How long the other ranks may take to end by themselves after one was stopped by a signal, which all have got."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
LIFELINE = "KVPREF_LIFELINE"
"""Names the pipe whose other end the starting process holds; it closes when that process is gone."""


def ranks_to_start(number: int | None, config: Given | None) -> int:
    """How many ranks this process has to start; 1 if it trains itself.

    Args:
        number: As given by ``--num-processes``.
        config: As given by ``--accelerate-config`` or in a file.

    Raises:
        InputError: If so many cannot be started from here, or the configuration cannot be used.
    """
    if number is not None:
        _check_number(number)
    if config is not None and config.value is not None:
        name = find_config(str(config.value), config.where)
        read_config(name)
        if number is None and num_started() == 1:
            number = num_processes_of(name, config.where)
    return number or 1


def _check_number(number: int) -> None:
    """Raise InputError unless so many ranks can be started from here."""
    if number < 1:
        raise InputError(f"--num-processes must be at least 1; got {number}")
    if num_started() > 1:
        raise InputError(
            f"--num-processes starts the processes itself, and {num_started()} were started already (WORLD_SIZE); "
            "leave it out, or start kvpref without torchrun"
        )


def start_ranks(number: int, arguments: list[str], output: Path) -> int:
    """Run ``kvpref ARGUMENTS...`` in `number` processes to their end.

    Args:
        number: Of ranks, all on this machine.
        arguments: Of the command line, without ``--num-processes``.
        output: The run's folder, for messages.

    Returns:
        The exit code of the run: that of the first rank that failed, 128 + the signal if one was killed.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # slow to import

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    read_end, write_end = os.pipe()
    environment = {**os.environ, **_for_all(number, store.port), LIFELINE: str(read_end)}
    command = [sys.executable, "-m", "kvpref", *arguments]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with _forwarded(ranks) as stop:
            for rank in range(number):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                # A group of its own: Ctrl-C in the terminal comes to this process alone, which passes it on once.
                ranks.append(
                    subprocess.Popen(
                        command,
                        env=environment | own,
                        pass_fds=[read_end],
                        process_group=0,
                        stdin=subprocess.DEVNULL,
                    )
                )
            return _watch(ranks, stop, output)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
        os.close(read_end)
        os.close(write_end)


def end_with_starter() -> None:
    """In a rank: end it if the process that started it is gone, since nobody would end it then."""
    pipe = os.environ.pop(LIFELINE, None)
    if pipe is None:
        return

    def wait() -> None:
        os.read(int(pipe), 1)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def without_number(arguments: list[str]) -> list[str]:
    """The arguments of a command line without ``--num-processes N``, in either spelling."""
    options, kept, given = ("--num-processes", "--num_processes"), list[str](), iter(arguments)
    for argument in given:
        if argument in options:
            next(given, None)
        elif argument.partition("=")[0] not in options:
            kept.append(argument)
    return kept


def _for_all(number: int, port: int) -> Mapping[str, str]:
    root = Path(__file__).parents[2]
    paths = [str(root)] if root.name not in ("site-packages", "dist-packages") else []
    num_threads = max(1, (os.cpu_count() or 1) // number)
    return {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "kvpref",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(num_threads)),
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


class _Stop:
    """How often the user asked to stop, and when the ranks are to be gone after the second time."""

    num_asked = 0
    deadline = math.inf


@contextmanager
def _forwarded(ranks: list[subprocess.Popen[bytes]]) -> Iterator[_Stop]:
    """While open, SIGINT and SIGTERM go to the ranks."""
    stop = _Stop()

    def forward(number: int, frame: FrameType | None) -> None:
        stop.num_asked += 1
        if stop.num_asked == 1:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping after this step; once more to stop at once\n")
        else:
            stop.deadline = min(stop.deadline, time.monotonic() + _OTHERS_S)
        for process in ranks:
            process.send_signal(number)

    before: list[tuple[signal.Signals, Any]] = [(number, signal.getsignal(number)) for number in _SIGNALS]
    for number, _ in before:
        signal.signal(number, forward)
    try:
        yield stop
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _watch(ranks: list[subprocess.Popen[bytes]], stop: _Stop, output: Path) -> int:
    """The exit code, once all have ended or one has failed."""
    while not _first_code(ranks) and time.monotonic() < stop.deadline:
        if all(process.returncode == 0 for process in ranks):
            return 0
        time.sleep(_POLL_S)
    code = _first_code(ranks) or 128 + signal.SIGINT
    if code < 0:
        rank = next(rank for rank, process in enumerate(ranks) if process.returncode == code)
        print(f"error: {_say_killed(rank, -code, output)}", file=sys.stderr)
        return 128 - code
    if code > 128:  # by a signal that all have got; rank 0 says what is saved
        end = min(stop.deadline, time.monotonic() + _OTHERS_S)
        while ranks[0].poll() is None and time.monotonic() < end:
            time.sleep(_POLL_S)
        if ranks[0].returncode is None:
            print(f"stopped at once; {'; '.join(_what_is_left(output))}", file=sys.stderr)
    return code


def _first_code(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Of a rank that failed, rather of one that was killed than of those that noticed; 0 if none did."""
    codes = [process.poll() or 0 for process in ranks]
    return min(codes) or max(codes)


def _say_killed(rank: int, number: int, output: Path) -> str:
    name = signal.Signals(number).name if number in signal.Signals._value2member_map_ else "unknown"
    why = ": often the kernel, when the machine's memory is full" if number == signal.SIGKILL else ""
    what, go_on = _what_is_left(output)
    return f"rank {rank} was killed (signal {number}, {name}{why}); the other ranks were ended; {what}, {go_on}"


def _what_is_left(output: Path) -> tuple[str, str]:
    from kvpref.training.saving import what_is_left

    return what_is_left(str(output))
