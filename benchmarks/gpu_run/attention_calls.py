"""Timed calls of a backend: forward and backward of a block of random queries, keys and values."""

from __future__ import annotations

import torch
from llama_models import LAYERS_OF_8B
from options import SweepOptions

from kvpref.ops.attention import AttentionParams, VarlenBlock, get_backend
from kvpref.prefix.blocks import VarlenLayout


class TimedBlock:
    """Forward and backward of one block, with the heads of an 8B model.

    Args:
        backend: Its name.
        layout: The block's pairs.
        options: Device, dtype; few heads if dry.
    """

    def __init__(self, backend: str, layout: VarlenLayout, options: SweepOptions) -> None:
        sizes = LAYERS_OF_8B
        self.heads, kv_heads, self.head_dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
        if options.dry_run:
            self.heads, kv_heads, self.head_dim = 4, 2, 32
        self.kernels, self.params = get_backend(backend), AttentionParams(scale=self.head_dim**-0.5)
        self.block = VarlenBlock.from_layout(layout, options.device)
        self.num_pairs = self.block.num_attended_pairs
        generator = torch.Generator(options.device).manual_seed(0)

        def random(num_rows: int, heads: int) -> torch.Tensor:
            shape = (num_rows, heads, self.head_dim)
            return torch.randn(shape, generator=generator, device=options.device, dtype=options.dtype)

        self.query, self.dout = (random(self.block.num_queries, self.heads) for _ in range(2))
        self.key, self.value = (random(self.block.num_keys, kv_heads) for _ in range(2))
        self.out, self.lse = self.forward()
        self.out = self.out.to(options.dtype)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp."""
        return self.kernels.forward(self.query, self.key, self.value, self.block, self.params)

    def backward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq, dk, dv."""
        return self.kernels.backward(
            self.dout, self.query, self.key, self.value, self.out, self.lse, self.block, self.params
        )

    @property
    def flops(self) -> dict[str, int]:
        """Two products per attended pair forward, five backward."""
        product = 2 * self.num_pairs * self.heads * self.head_dim
        return {"forward": 2 * product, "backward": 5 * product}
