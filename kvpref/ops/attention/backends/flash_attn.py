"""`flash_attn`, `flash_attn_3`, `flash_attn_4`: the FlashAttention packages; one varlen kernel launch per block.

Their internal functions are called, because the public ones neither take an outside output and log-sum-exp in the
backward pass nor return gradients without autograd. Signatures were read from the repository Dao-AILab/flash-attention
at the versions that each class names.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch

from kvpref.ops.attention.backends import determinism, flash_kernels
from kvpref.ops.attention.backends.interface import Abilities, Needs
from kvpref.ops.attention.backends.optional_package import OptionalPackage
from kvpref.ops.attention.backends.packaged import PackagedBackend
from kvpref.ops.attention.block import AttentionParams, VarlenBlock
from kvpref.ops.attention.splitting import CallLimits

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _FlashAttention(PackagedBackend):
    """What the generations share: dtypes, native GQA, varlen log-sum-exp (H, T), masks aligned to the bottom right
    (the usual place here, because they are on squares only).
    """

    max_head_dim: ClassVar[int] = 256
    min_capability: ClassVar[tuple[int, int]] = flash_kernels.AMPERE
    below_capability: ClassVar[tuple[int, int] | None] = None

    def refusal(self, query: torch.Tensor, needs: Needs) -> str | None:
        reason = flash_kernels.refusal(query, needs, self.max_head_dim, self.min_capability)
        if reason is not None:
            return reason
        capability, bound = torch.cuda.get_device_capability(query.device), self.below_capability
        if bound is not None and capability >= bound:
            found, limit = flash_kernels.dotted(capability), flash_kernels.dotted(bound)
            return f"it needs compute capability below {limit}, got {found}"
        missing = self.package.missing_reason()
        if missing is None and determinism.is_required():
            missing = self._nondeterministic_reason(query, needs)
        return missing or self.probe_failure(query, needs)

    def _nondeterministic_reason(self, query: torch.Tensor, needs: Needs) -> str | None:
        """Why the package has no deterministic backward for this query; None if it has."""
        return None

    def call_limits(self, query: torch.Tensor) -> CallLimits:
        return flash_kernels.call_limits(query)


class FlashAttn(_FlashAttention):
    """FlashAttention-2 (Dao 2023, arXiv 2307.08691), package flash-attn 2.7 to 2.8.

    Older releases return eight tensors in another order, so they are refused.
    """

    name = "flash_attn"
    can = Abilities(windows=True, anti_causal=True, softcap=True)
    package = OptionalPackage(
        module="flash_attn.flash_attn_interface",
        distribution="flash-attn",
        minimum_version="2.7.0",
        install='pip install "kvpref[flash-attn]" --no-build-isolation',
    )

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = self.package.load()._flash_attn_varlen_forward(
            q,
            k,
            v,
            block.cu_seqlens_q,
            block.cu_seqlens_k,
            flash_kernels.longest_query(block),
            block.max_seqlen_k,
            dropout_p=0.0,
            softmax_scale=params.scale,
            causal=block.causal,
            window_size_left=flash_kernels.window_of(block)[0],
            window_size_right=flash_kernels.window_of(block)[1],
            softcap=params.softcap or 0.0,
        )
        return out, lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        block: VarlenBlock,
        params: AttentionParams,
    ) -> Gradients:
        dq, dk, dv = _zeros(q, k, v)
        self.package.load()._flash_attn_varlen_backward(
            dout.contiguous(),
            q,
            k,
            v,
            out,
            lse.contiguous(),
            dq,
            dk,
            dv,
            block.cu_seqlens_q,
            block.cu_seqlens_k,
            block.max_seqlen_q,
            block.max_seqlen_k,
            dropout_p=0.0,
            softmax_scale=params.scale,
            causal=block.causal,
            window_size_left=flash_kernels.window_of(block)[0],
            window_size_right=flash_kernels.window_of(block)[1],
            softcap=params.softcap or 0.0,
            alibi_slopes=None,
            deterministic=determinism.chosen_for(self.name),
        )
        return dq, dk, dv


class FlashAttn3(_FlashAttention):
    """FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608), as built from ``hopper/`` since April 2025.

    Arguments go by position up to `causal`, as in the package's own calls: between releases names
    (``out`` to ``out_``, ``causal`` to ``is_causal``) and defaults changed, positions did not. Keys are not split
    in the forward pass (``num_splits`` is 1 by default), so it is deterministic.
    """

    name = "flash_attn_3"
    can = Abilities(windows=True, softcap=True)
    below_capability = (10, 0)
    package = OptionalPackage(
        module="flash_attn_interface",
        distribution="flash-attn-3",
        install="build it from the folder hopper of github.com/Dao-AILab/flash-attention",
    )

    def _nondeterministic_reason(self, query: torch.Tensor, needs: Needs) -> str | None:
        # hopper/flash_api.cpp rounds the head dim up to 64, 96, 128, 192 or 256 and refuses 256.
        head_dim = needs.head_dim(query)
        return f"it has no deterministic backward for head dims above 192, got {head_dim}" if head_dim > 192 else None

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new_keys_and_out = (None, None, None, None)  # k_new, v_new, qv, out
        new_offsets_and_used = (None, None, None)  # cu_seqlens_k_new, seqused_q, seqused_k
        paging_rotary_descale = (None,) * 9
        kernel = self.package.load()._flash_attn_forward
        out, lse, *_ = kernel(
            q,
            k,
            v,
            *new_keys_and_out,
            block.cu_seqlens_q,
            block.cu_seqlens_k,
            *new_offsets_and_used,
            block.max_seqlen_q,
            block.max_seqlen_k,
            *paging_rotary_descale,
            params.scale,
            block.causal,
            **_window_arguments(kernel, block),
            softcap=params.softcap or 0.0,
        )
        return out, lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        block: VarlenBlock,
        params: AttentionParams,
    ) -> Gradients:
        dq, dk, dv = _zeros(q, k, v)
        kernel = self.package.load()._flash_attn_backward
        kernel(
            dout.contiguous(),
            q,
            k,
            v,
            out,
            lse.contiguous(),
            block.cu_seqlens_q,
            block.cu_seqlens_k,
            None,  # seqused_q
            None,  # seqused_k
            block.max_seqlen_q,
            block.max_seqlen_k,
            dq,
            dk,
            dv,
            params.scale,
            block.causal,
            **_window_arguments(kernel, block),
            softcap=params.softcap or 0.0,
            deterministic=determinism.chosen_for(self.name),
        )
        return dq, dk, dv


class FlashAttn4(_FlashAttention):
    """FlashAttention-4 in CuTe DSL, package flash-attn-4 (4.0.0 betas); Hopper and Blackwell, head dims up to 128.

    Its forward returns two tensors or four, depending on the release; the first two are the output and the
    log-sum-exp in all of them.
    """

    name = "flash_attn_4"
    max_head_dim = 128
    min_capability = (9, 0)
    below_capability = (13, 0)
    package = OptionalPackage(
        module="flash_attn.cute.interface", distribution="flash-attn-4", install="pip install --pre flash-attn-4"
    )

    def _nondeterministic_reason(self, query: torch.Tensor, needs: Needs) -> str | None:
        # flash_attn/cute/interface.py asserts this; betas 0 to 4 refuse Hopper too, which the tiny call finds.
        major, minor = torch.cuda.get_device_capability(query.device)
        return f"it has no deterministic backward on compute capability {major}.{minor}" if major == 12 else None

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = self.package.load()._flash_attn_fwd(
            q,
            k,
            v,
            cu_seqlens_q=block.cu_seqlens_q,
            cu_seqlens_k=block.cu_seqlens_k,
            max_seqlen_q=block.max_seqlen_q,
            max_seqlen_k=block.max_seqlen_k,
            softmax_scale=params.scale,
            causal=block.causal,
            return_lse=True,
        )
        return result[0], result[1]

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        block: VarlenBlock,
        params: AttentionParams,
    ) -> Gradients:
        dq, dk, dv = _zeros(q, k, v)
        self.package.load()._flash_attn_bwd(
            q,
            k,
            v,
            out,
            dout.contiguous(),
            lse.contiguous(),
            softmax_scale=params.scale,
            causal=block.causal,
            cu_seqlens_q=block.cu_seqlens_q,
            cu_seqlens_k=block.cu_seqlens_k,
            max_seqlen_q=block.max_seqlen_q,
            max_seqlen_k=block.max_seqlen_k,
            deterministic=determinism.chosen_for(self.name),
            dq=dq,
            dk=dk,
            dv=dv,
        )
        return dq, dk, dv


def _window_arguments(kernel: Any, block: VarlenBlock) -> dict[str, Any]:
    """FlashAttention-3's arguments for the block's window: one pair, or two numbers since November 2025."""
    left, right = flash_kernels.window_of(block)
    # Since then the functions are operators, whose signature is (*args, **kwargs).
    names = inspect.signature(getattr(kernel, "_init_fn", kernel)).parameters
    if "window_size" in names:
        return {"window_size": (left, right)}
    return {"window_size_left": left, "window_size_right": right}


def _zeros(*tensors: torch.Tensor) -> Gradients:
    """Preallocated gradients: zero where a kernel writes nothing, as for keys of a pair without queries."""
    dq, dk, dv = (torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)
    return dq, dk, dv
