"""The backends for CUDA on stand-ins for their kernels, so that they take CPU tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import stand_in_efficient
import stand_in_torch_flash
import torch
from stand_in_flash_attn import FlashAttention2, FlashAttention4, FlashAttention4WithExtras
from stand_in_flash_attn_3 import FlashAttention3, FlashAttention3Of2025
from stand_in_kernels import module_like
from stand_in_xformers import Xformers

from kvpref.ops.attention import get_backend
from kvpref.ops.attention.backends import optional_package
from kvpref.ops.attention.backends.interface import Backend

STAND_INS: dict[str, tuple[str, str, Callable[[], object]]] = {
    "cuda_flash": ("cuda_flash", "", object),
    "efficient": ("efficient", "", object),
    "flash_attn": ("flash_attn", "flash_attn.flash_attn_interface", FlashAttention2),
    "flash_attn_3": ("flash_attn_3", "flash_attn_interface", FlashAttention3),
    "flash_attn_3 of 2025": ("flash_attn_3", "flash_attn_interface", FlashAttention3Of2025),
    "flash_attn_4": ("flash_attn_4", "flash_attn.cute.interface", FlashAttention4),
    "flash_attn_4 with extras": ("flash_attn_4", "flash_attn.cute.interface", FlashAttention4WithExtras),
    "xformers": ("xformers", "xformers.ops.fmha", Xformers),
}
"""Backend, the module of its package and what stands in for it; none for PyTorch's own kernels."""


@contextmanager
def running_on_stand_in(which: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of the backend, which serves whatever its abilities allow."""
    name, module, kernels = STAND_INS[which]
    optional_package._load.cache_clear()
    if module:
        monkeypatch.setitem(sys.modules, module, module_like(kernels()))
    for direction in ("forward", "backward"):
        efficient = getattr(stand_in_efficient, f"efficient_attention_{direction}")
        monkeypatch.setattr(torch.ops.aten, f"_efficient_attention_{direction}", efficient)
        flash = getattr(stand_in_torch_flash, f"flash_attention_{direction}")
        monkeypatch.setattr(torch.ops.aten, f"_flash_attention_{direction}", flash)

    def serve(self: Backend, *args: object) -> None:
        return None

    monkeypatch.setattr(type(get_backend(name)), "refusal", serve)
    yield name
    optional_package._load.cache_clear()
