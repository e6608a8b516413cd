"""Kernels of flash-linear-attention, mamba-ssm and causal-conv1d where installed: called as their signatures ask."""
# ruff: noqa: N803 (names of mamba-ssm)

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from hybrid_groups import hybrid_groups
from tiny_hybrids import tiny_hybrid
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5

import kvpref

Seen = list[dict[str, Any]]


def _installed(kernel: Callable[..., Any], seen: Seen) -> Callable[..., Any]:
    """As transformers wraps a package's function: keyword arguments that it does not have are dropped."""
    signature = inspect.signature(kernel)

    @functools.wraps(kernel)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        kept = {name: value for name, value in kwargs.items() if name in signature.parameters}
        seen.append(signature.bind(*args, **kept).arguments)
        return kernel(*args, **kept)

    return wrapped


def _stand_in_delta(own: Callable[..., Any]) -> Callable[..., Any]:
    def chunk_gated_delta_rule(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        scale: float | None = None,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: torch.Tensor | None = None,
    ) -> Any:
        assert scale is None
        assert cu_seqlens is None
        options = {"output_final_state": output_final_state, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        return own(q, k, v, g=g, beta=beta, initial_state=initial_state, **options)

    return chunk_gated_delta_rule


def _stand_in_scan(own: Callable[..., Any]) -> Callable[..., Any]:
    def mamba_chunk_scan_combined(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        chunk_size: int,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        initial_states: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
    ) -> Any:
        assert seq_idx is None
        assert (dt >= 0).all()
        rest = {"dt_bias": dt_bias, "initial_states": initial_states, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
        return own(x, dt, A, B, C, chunk_size, D=D, z=z, return_final_states=return_final_states, **rest)

    return mamba_chunk_scan_combined


def _stand_in_convolution(own: Callable[..., Any]) -> Callable[..., Any]:
    def causal_conv1d_fn(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        initial_states: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> torch.Tensor:
        assert seq_idx is None
        assert initial_states is None
        assert x.stride(2) == 1 or x.stride(1) == 1
        out: torch.Tensor = own(x, weight, bias, activation=activation)
        return out

    return causal_conv1d_fn


def _whole_mixer(*_: Any, **__: Any) -> torch.Tensor:
    raise AssertionError("a kernel for the whole mixer knows no states")


@pytest.mark.parametrize(
    ("name", "modeling", "scan", "stand_in", "state"),
    [
        ("Qwen3_5Text", modeling_qwen3_5, "torch_chunk_gated_delta_rule", _stand_in_delta, "initial_state"),
        ("Mamba2", modeling_mamba2, "mamba2_chunk_scan", _stand_in_scan, "initial_states"),
    ],
)
def test_kernels_get_rows_and_states(
    name: str, modeling: Any, scan: str, stand_in: Any, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_hybrid(name, torch.float64)
    truth = oracle.naive(oracle.twin(model), hybrid_groups())
    scans: Seen = []
    convolutions: Seen = []
    monkeypatch.setattr(modeling, scan, _installed(stand_in(getattr(modeling, scan)), scans))
    monkeypatch.setattr(
        modeling, "causal_conv1d_fn", _installed(_stand_in_convolution(modeling.causal_conv1d_fn), convolutions)
    )
    if hasattr(modeling, "mamba2_split_conv1d_scan_combined"):
        monkeypatch.setattr(modeling, "mamba2_split_conv1d_scan_combined", _whole_mixer)
    kvpref.attach(model)
    found = oracle.shared(model, kvpref.collate(hybrid_groups(), min_shared_tokens=1))
    oracle.assert_same(found, truth, 1e-10)
    # Three levels in two layers: prompts begin with zeros, what follows with states.
    given = [call.get(state) is not None for call in scans]
    assert given == [False, False, True, True, True, True]
    assert all(len(next(iter(call.values()))) > 1 for call in scans)  # rows of one segment each
    assert all(len(call["x"]) == 1 for call in convolutions)
