"""Checks that attention backends work on this machine: each runs a tiny forward and backward against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvpref.ops.attention import AttentionParams, VarlenBlock, get_backend
from kvpref.ops.attention.backends import backend_names
from kvpref.ops.attention.backends.plain_torch import PlainTorch
from kvpref.prefix.blocks import VarlenLayout
from kvpref.profiling.automatic import NO_MEMORY

REFERENCE = "reference"
_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM = 4, 2, 64
_PARAMS = AttentionParams(scale=_HEAD_DIM**-0.5)
_LAYOUTS = (
    VarlenLayout(cu_seqlens_q=(0, 5, 12), cu_seqlens_k=(0, 5, 12), shape="causal"),
    VarlenLayout(
        cu_seqlens_q=(0, 9, 9, 12), cu_seqlens_k=(0, 20, 23, 40), shape="rectangle"
    ),  # one pair without queries
)


@dataclass(frozen=True, kw_only=True)
class BackendProbe:
    """How one attention backend does here."""

    name: str
    """The backend's name."""

    device: str
    """Type of the device it was tried on."""

    errors: dict[str, float]
    """Per dtype that works: the largest relative error of output, log-sum-exp and gradients, on norms."""

    reason: str | None
    """Why it does not work, and what would help; None if it works."""

    cost: str | None = None
    """What this backend costs that others do not, if anything."""

    @property
    def works(self) -> bool:
        """Whether it ran in some dtype, and was correct in every dtype that it claims to support."""
        return self.reason is None

    @property
    def is_fast(self) -> bool:
        """Whether it works and is not plain torch."""
        return self.works and not isinstance(get_backend(self.name), PlainTorch)


def probe_backends(names: Sequence[str] | None = None) -> list[BackendProbe]:
    """Try the named backends, or all, on a GPU if they support one here, else on the CPU."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    return [_probe(name, devices) for name in (backend_names() if names is None else names)]


def _probe(name: str, devices: list[str]) -> BackendProbe:
    refusals = []
    for device in devices:
        served, refusal = _served_dtypes(name, device)
        if served:
            return _run_probes(name, device, served)
        refusals.append(refusal)
    no_gpu = "" if "cuda" in devices else "; PyTorch sees no CUDA device here"
    return BackendProbe(name=name, device=devices[0], errors={}, reason=refusals[0] + no_gpu)


def _served_dtypes(name: str, device: str) -> tuple[list[torch.dtype], str]:
    """The dtypes that the backend claims to support; if none, its reason for refusing the first."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if device == "cuda" else [torch.float32]
    reasons = {dtype: _refusal(name, dtype, device) for dtype in dtypes}
    return [dtype for dtype, reason in reasons.items() if reason is None], next(iter(reasons.values())) or ""


def _refusal(name: str, dtype: torch.dtype, device: str) -> str | None:
    try:
        query = torch.empty(1, _NUM_HEADS, _HEAD_DIM, dtype=dtype, device=device)
        return get_backend(name).unsupported_reason(query)
    except torch.OutOfMemoryError:
        return NO_MEMORY


def _run_probes(name: str, device: str, dtypes: list[torch.dtype]) -> BackendProbe:
    errors: dict[str, float] = {}
    reason = None
    for dtype in dtypes:
        label = str(dtype).removeprefix("torch.")
        try:
            error = max(_relative_error(name, layout, device, dtype) for layout in _LAYOUTS)
        except Exception as failure:  # whatever a kernel raises is shown beside the other backends
            message = (str(failure).splitlines() or [""])[0]
            reason = f"it failed in {label}: {type(failure).__name__}: {message}"
            continue
        tolerance = _tolerance(dtype)
        if error <= tolerance:
            errors[label] = error
        else:
            reason = f"it is wrong in {label}: relative error {error:.1e}, rounding explains {tolerance:.0e}"
    return BackendProbe(name=name, device=device, errors=errors, reason=reason, cost=get_backend(name).cost)


def _tolerance(dtype: torch.dtype) -> float:
    """fp32 kernels may multiply in three TF32 products; 16-bit ones round probabilities and results."""
    return 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


def _relative_error(name: str, layout: VarlenLayout, device: str, dtype: torch.dtype) -> float:
    """The largest ``|found - truth| / |truth|`` over output, log-sum-exp, dq, dk, dv; truth in fp64 on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def rows(count: int, heads: int) -> torch.Tensor:
        # Rounded to the dtype first, so that both sides compute on the same numbers.
        return torch.randn(count, heads, _HEAD_DIM, generator=generator).to(dtype)

    q, dout = (rows(layout.cu_seqlens_q[-1], _NUM_HEADS) for _ in range(2))
    k, v = (rows(layout.cu_seqlens_k[-1], _NUM_KV_HEADS) for _ in range(2))
    truth = _forward_backward(REFERENCE, layout, [tensor.double() for tensor in (q, k, v, dout)])
    found = _forward_backward(name, layout, [tensor.to(device) for tensor in (q, k, v, dout)])
    return max(
        float((one.double().cpu() - exact).norm() / exact.norm()) for one, exact in zip(found, truth, strict=True)
    )


def _forward_backward(name: str, layout: VarlenLayout, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    q, k, v, dout = inputs
    backend, block = get_backend(name), VarlenBlock.from_layout(layout, q.device)
    out, lse = backend.forward(q, k, v, block, _PARAMS)
    return [out, lse, *backend.backward(dout, q, k, v, out.to(q.dtype), lse, block, _PARAMS)]
