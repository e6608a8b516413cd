"""One-line errors for what transformers and accelerate refuse while making the trainer and its optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer

from kvpref.errors import InputError, RunError


@contextlib.contextmanager
def made_by_transformers(what: str) -> Iterator[None]:
    """Turn errors of a library's constructor into InputError.

    Only that constructor may run inside, so that no bug of kvpref is taken for a mistake in the settings.

    Args:
        what: The object being made, for the message.
    """
    try:
        yield
    except (InputError, RunError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # the last two have nothing to do with settings
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} cannot be made with these settings: {reason}") from error


class ConstructedTrainer(Trainer):
    """`transformers.Trainer` with one-line errors for what cannot be made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with made_by_transformers("the trainer"):
            super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        with made_by_transformers("the optimizer"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        with made_by_transformers("the learning-rate schedule"):
            return super().create_scheduler(*args, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As in `transformers.Trainer`, with one InputError for all network errors, which have no common base."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:
            raise InputError(
                f"push_to_hub: the hub's repository cannot be made: {' '.join(str(error).split())}; leave it out, or "
                "see to the network and the token"
            ) from error
