"""How a run of several ranks ends if one fails: one message, which names the rank, and no rank waits for the others.

Ranks agree on who reports through the store of their launcher: torchrun's, or that of ``kvpref train
--num-processes``. It exists before torch.distributed does, and outlives every rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from kvpref.errors import InputError, SharedRunError
from kvpref.ranks import num_started, own_rank

ALIKE_S = 10.0
"""How long a rank that found bad input waits for the others to find the same."""

_END_S = 10.0
"""How long a rank that lost another one waits for the launcher to end it before reporting itself."""

_SPEECH_S = 10.0
_CONNECT = timedelta(seconds=10)

_CLAIM, _SPOKEN, _ALIKE = "kvpref/claim", "kvpref/spoken", "kvpref/alike"

_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "gloo/transport",
    "Gloo connectFullMesh failed",
    "NCCL",
    "Timed out waiting",
)
"""Parts of the backends' messages if another rank is gone; gloo has no error class for it."""


def end_rank(message: str, code: int, error: BaseException) -> NoReturn:
    """End this rank of several because of `error`: at once, and with a message if no other rank has reported.

    An error on all ranks (an `InputError`, a `SharedRunError`) is reported once, by rank 0; any other by the first
    rank that has one. Consequences of another rank's end are not reported, unless no launcher ends this one.

    Args:
        message: For the user.
        code: The exit code.
        error: The cause.
    """
    # From now on a launcher may end this process; Ctrl-C has nothing to add.
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        if lost_another(error):
            time.sleep(_END_S)
            message = f"another rank ended or cannot be reached ({_first_line(error)}); continue with --resume"
        _say(message, may_be_alike=isinstance(error, InputError | SharedRunError))
    finally:
        _leave(code)


def end_stopped(message: str, code: int) -> NoReturn:
    """End this rank, which was asked to stop; rank 0 reports it, unless a failure was the reason."""
    try:
        store = _find_store()
        failed = store is not None and store.check([_CLAIM])
        if own_rank() == 0 and not failed:
            print(message, file=sys.stderr)
    finally:
        _leave(code)


def lost_another(error: BaseException) -> bool:
    """Whether an error says that another rank is gone."""
    return any(
        isinstance(item, dist.DistError)
        or (isinstance(item, RuntimeError) and any(part in str(item) for part in _LOST))
        for item in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, such as the collective inside a save that failed."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _first_line(error: BaseException) -> str:
    *_, root = _causes(error)
    return (str(root).strip().splitlines() or [type(root).__name__])[0]


def _say(message: str, *, may_be_alike: bool) -> None:
    store = _find_store()
    if store is None:
        _print_of_rank(message)
        return
    if may_be_alike and _all_met(store, message):
        _print_claimed(store, lambda: print(f"error: {message}", file=sys.stderr), may_claim=own_rank() == 0)
    else:
        _print_claimed(store, lambda: _print_of_rank(message), may_claim=True)


def _print_of_rank(message: str) -> None:
    print(f"error: rank {own_rank()}: {message}", file=sys.stderr)


def _print_claimed(store: Store, speak: Callable[[], None], *, may_claim: bool) -> None:
    """Report if no rank has; otherwise wait until one has, since the launcher ends all ranks when one ends."""
    own = str(own_rank())
    if may_claim and store.compare_set(_CLAIM, "", own) == own.encode():
        speak()
        sys.stderr.flush()
        store.set(_SPOKEN, own)
    else:
        _wait_until(lambda: store.check([_SPOKEN]), _SPEECH_S)


def _all_met(store: Store, message: str) -> bool:
    """Whether all ranks failed with this message; waits for them until one reports."""
    key = f"{_ALIKE}/{hashlib.sha256(message.encode()).hexdigest()}"
    store.add(key, 1)

    def all_came() -> bool:
        return store.add(key, 0) >= num_started()

    _wait_until(lambda: all_came() or store.check([_CLAIM]), ALIKE_S)
    return all_came()


def _wait_until(is_done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_done() and time.monotonic() < end:
        time.sleep(0.05)


def _find_store() -> Store | None:
    """A connection of our own to the store of this run: the launcher's, or rank 0's once torch.distributed is up."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    has_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not address or not port.isdecimal() or not (has_launcher or dist.is_initialized()):
        return None
    try:
        return TCPStore(address, int(port), is_master=False, timeout=_CONNECT, wait_for_workers=False)
    except (dist.DistError, RuntimeError, ValueError):
        return None


def _leave(code: int) -> NoReturn:
    """End without Python's shutdown, which would wait for collectives that never come."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
