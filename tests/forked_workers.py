"""A worker script on several gloo ranks: forks of a process that has imported everything. See `two_processes`.

Run as ``forked_workers.py NUM_RANKS WORKER ARGUMENTS...``.
"""

from __future__ import annotations

import gc
import os
import runpy
import signal
import socket
import sys

import torch
import transformers.trainer  # noqa: F401 - before the forks, so that no rank pays for it

import kvpref.training  # noqa: F401 - likewise


def main(num_ranks: int, worker: str, arguments: list[str]) -> int:
    """The exit code of the first rank that fails, whose failure ends the others; 0 if none does."""
    torch.set_num_threads(1)
    gc.freeze()  # as in tests/conftest.py
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = {_fork(rank, num_ranks, port, worker, arguments) for rank in range(num_ranks)}
    failed = 0
    while ranks:
        process, status = os.wait()
        ranks.discard(process)
        if status and not failed:
            failed = 1
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return failed


def _fork(rank: int, num_ranks: int, port: int, worker: str, arguments: list[str]) -> int:
    process = os.fork()
    if process:
        return process
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    sys.argv = [worker, *arguments]
    code = 1
    try:
        runpy.run_path(worker, run_name="__main__")
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
