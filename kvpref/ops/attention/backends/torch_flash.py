"""Which kernels PyTorch's flash attention operator runs: its own FlashAttention-2, or kernels that a user activated.

`torch.nn.attention.activate_flash_attention_impl` replaces `aten::_flash_attention_forward` and `_backward`, and with
them PyTorch's own attention, for a whole process. kvpref neither activates nor calls the replacements: they decide
determinism by another rule (warn-only counts as on; if it is off, FA3's splits the keys of the forward pass), and
FA4's unpacks two values from a function that returns four (PyTorch 2.13 and earlier). kvpref's backends call the same
packages directly.
"""

from __future__ import annotations

import torch

_BACKEND_OF = {"FA3": "flash_attn_3", "FA4": "flash_attn_4"}
"""Name of an activated implementation -> kvpref's backend for the same kernels."""


def activated() -> str | None:
    """The name of the activated implementation, such as ``FA3``; None for PyTorch's own FlashAttention-2."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)  # since PyTorch 2.10
    return None if current is None else current()


def backend_of_activated() -> str | None:
    """kvpref's backend for the activated kernels; None if there are none, or no backend for them."""
    return _BACKEND_OF.get(activated() or "")


def replaced_reason() -> str | None:
    """Why the operator is not FlashAttention-2 here, and what to do; None if it is."""
    found = activated()
    if found is None:
        return None
    backend = backend_of_activated()
    instead = f"choose backend {backend!r}, or " if backend else ""
    return (
        f"PyTorch's flash attention operator runs {found} in this process (activate_flash_attention_impl), not "
        f"FlashAttention-2; {instead}call torch.nn.attention.restore_flash_attention_impl()"
    )
