"""Which attention backends can run here."""

from __future__ import annotations

import torch
from options import SweepOptions

from kvpref.ops.attention import get_backend
from kvpref.ops.attention.backends import backend_names

WITHOUT_KERNELS = ("tiled", "reference")
NEWER_GENERATIONS = ("flash_attn_3", "flash_attn_4")
FLASH_ATTENTION_2 = ("cuda_flash", "flash_attn", "xformers")
"""Those whose backward computes an offset in 32 bits in some release."""


def refusal(name: str, options: SweepOptions, head_dim: int = 128) -> str | None:
    """Why a backend does not work here, or None."""
    query = torch.empty(1, 1, head_dim, dtype=options.dtype, device=options.device)
    return get_backend(name).unsupported_reason(query)


def fast_backends(options: SweepOptions) -> list[str]:
    """All backends that work here and have kernels."""
    return [name for name in backend_names() if name not in WITHOUT_KERNELS and refusal(name, options) is None]
