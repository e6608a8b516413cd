"""A loss that fails on one rank, as its setting says, in the middle of a run; read from this file by `kvpref train`."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

import kvpref
from kvpref.ranks import own_rank

calls = 0


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_interrupted() -> None:
    """As by Ctrl-C in the terminal of the process that started the ranks."""
    os.kill(os.getppid(), signal.SIGINT)


def fail_to_write() -> None:
    raise kvpref.RunError("cannot save: no space left")


def find_a_bad_row() -> None:
    raise kvpref.InputError("pairs.jsonl:7: no such picture")


def have_a_bug() -> None:
    raise KeyError("no such thing")


FAILURES = {
    "killed": be_killed,
    "interrupted": be_interrupted,
    "run_error": fail_to_write,
    "bad_row": find_a_bad_row,
    "bug": have_a_bug,
    "nan": lambda: None,
}


@kvpref.loss()
def failing(policy, reference, batch, *, failure: str = "", at: int = 0, rank: int = 1, marker: str = ""):
    """SFT, which fails in call number `at` on one rank; once only if a marker file is named."""
    global calls
    calls += 1
    loss = -policy.mean().mean()
    if not failure or own_rank() != rank or calls != at or (marker and Path(marker).exists()):
        return kvpref.LossOutput(loss, {})
    if marker:
        Path(marker).touch()
    FAILURES[failure]()
    return kvpref.LossOutput(loss * torch.nan if failure == "nan" else loss, {})
