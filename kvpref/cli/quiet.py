"""What libraries print on stderr of their own, and nobody can act on. To be called before they are imported."""

from __future__ import annotations

import os
import sys
import warnings

_NOISE = ((FutureWarning, "`is_gradient_checkpointing` is deprecated"),)
"""Warnings that libraries raise about each other: PEFT reads a name that transformers has changed."""


def hide_library_noise() -> None:
    """Hide progress bars of Hugging Face libraries where no terminal shows them, and warnings that are not for users.

    Bars that the user has switched on by the environment stay.
    """
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    for category, message in _NOISE:
        warnings.filterwarnings("ignore", message, category)


def hide_profiler_noise() -> None:
    """Hide what PyTorch's C++ part warns of while memory is profiled: blocks that were allocated before."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
