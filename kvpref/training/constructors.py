"""What transformers and accelerate refuse while they make the trainer and its optimizer, in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer

from kvpref.errors import InputError, RunError


@contextlib.contextmanager
def made_by_transformers(what: str) -> Iterator[None]:
    """Raise InputError for what a constructor of a library refuses.

    Nothing but that constructor runs inside, so that no mistake of kvpref's own is taken for one of the settings.

    Args:
        what: Is made, for the message.
    """
    try:
        yield
    except (InputError, RunError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # the last two are no matter of settings
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} cannot be made with these settings: {reason}") from error


class ConstructedTrainer(Trainer):
    """`transformers.Trainer` that says in one line what cannot be made."""

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
        """As in `transformers.Trainer`; the network's errors have no common base."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:
            raise InputError(
                f"push_to_hub: the hub's repository cannot be made: {' '.join(str(error).split())}; leave it out, or "
                "see to the network and the token"
            ) from error
