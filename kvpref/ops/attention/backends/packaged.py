"""Backends whose kernels come from an optional package: its version, and a tiny call that tells whether those kernels
run here at all.

A package may import cleanly and claim to be available, and still refuse every input: built for a different CUDA
version than PyTorch, without a backward pass, for another architecture, or without the head dim.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from kvpref.ops.attention.backends import determinism
from kvpref.ops.attention.backends.interface import Backend, Needs
from kvpref.ops.attention.backends.optional_package import OptionalPackage
from kvpref.ops.attention.block import AttentionParams, VarlenBlock
from kvpref.prefix.blocks import VarlenLayout

_LAYOUTS = (
    VarlenLayout(cu_seqlens_q=(0, 3, 5), cu_seqlens_k=(0, 3, 5), shape="causal"),
    VarlenLayout(cu_seqlens_q=(0, 3, 5), cu_seqlens_k=(0, 4, 9), shape="rectangle"),
)
_NUM_HEADS, _NUM_KV_HEADS = 4, 2
_LONGEST_MESSAGE = 300


class PackagedBackend(Backend):
    """Kernels of an optional package."""

    package: ClassVar[OptionalPackage]

    def provider(self) -> str:
        return self.package.name_and_version()

    def probe_failure(self, query: torch.Tensor, needs: Needs) -> str | None:
        """What a tiny forward and backward on the query's device raised, and what to do; None if they ran.

        Runs once per device, dtype, head dim, presence of a softcap and rule of determinism, on its own tensors; for
        CUDA queries only.

        Raises:
            torch.OutOfMemoryError: If there is no memory left for it, which says nothing about the kernels.
        """
        head_dim, softcap = needs.head_dim(query), 30.0 if needs.softcap else None
        params = AttentionParams(scale=head_dim**-0.5, softcap=softcap)
        return _probe_failure(self, _Probe(query.device, query.dtype, head_dim, params), determinism.is_required())


class _Probe(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    params: AttentionParams


@cache
def _probe_failure(backend: PackagedBackend, probe: _Probe, deterministic: bool) -> str | None:
    try:
        _run(backend, probe)
    except torch.OutOfMemoryError:
        raise  # not cached: there may be memory next time, and until then no other kernels should run unasked
    except Exception as error:  # packages fail in different ways; whatever this one raises is shown to the user
        what = "a tiny deterministic call" if deterministic else "a tiny call"
        return (
            f"{what} on {probe.device} failed ({type(error).__name__}: {_shortened(str(error))}) with "
            f"{backend.provider()}, torch {torch.__version__}, CUDA {torch.version.cuda}; "
            f"install a build for these ({backend.package.install}), or choose another backend"
        )
    return None


def _run(backend: PackagedBackend, probe: _Probe) -> None:
    """Forward and backward of a few rows. The caller may be in any mode: these tensors are real, without gradients."""
    device, dtype, head_dim, params = probe
    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        for layout in _LAYOUTS:
            query = torch.ones(layout.cu_seqlens_q[-1], _NUM_HEADS, head_dim, device=device, dtype=dtype)
            key = torch.ones(layout.cu_seqlens_k[-1], _NUM_KV_HEADS, head_dim, device=device, dtype=dtype)
            block = VarlenBlock.from_layout(layout, device)
            with torch.cuda.device_of(query):
                out, lse = backend.forward(query, key, key, block, params)
                backend.backward(query, query, key, key, out, lse, block, params)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels fail when they run, not when they are started


def _shortened(message: str) -> str:
    """The message on one line, cut in the middle: xFormers puts its reason at the end, CUDA at the beginning."""
    text, half = " ".join(message.split()), _LONGEST_MESSAGE // 2
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"
