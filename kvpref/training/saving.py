"""What a failed write becomes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from safetensors import SafetensorError

from kvpref.errors import RunError


@contextlib.contextmanager
def saving(output_dir: str | None, step: int) -> Iterator[None]:
    """Raise RunError if what is written inside cannot be.

    Args:
        output_dir: Where to, for the message.
        step: The optimizer step, for the message.
    """
    try:
        yield
    except RunError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        # A full disk shows as any of the three, depending on which file was being written.
        raise RunError(
            f"cannot save to {output_dir} at step {step}: {error}; earlier checkpoints are intact. Make room (or fix "
            "permissions), then continue with --resume"
        ) from error
