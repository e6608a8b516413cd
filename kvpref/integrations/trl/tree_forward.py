"""Log-probs and entropies over TRL's tree rows: as a function, and as the forward that AsyncGRPOTrainer calls.

Shape legend as in `kvpref.integrations.trl.tree_rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from kvpref.engine.passes import response_logps
from kvpref.errors import InputError
from kvpref.integrations.agent_loops import TreeLogps
from kvpref.integrations.trl.forwards import Inside, refuse_inputs, serve
from kvpref.integrations.trl.padded import IGNORED_LABEL
from kvpref.integrations.trl.tree_rows import NEEDED, TreeRows
from kvpref.plan.sharing import DEFAULT_MIN_SHARED_TOKENS
from kvpref.records.requests import HeadOptions

_LENGTHS = ("tree_max_seqlen_q", "tree_max_seqlen_k")
"""Further inputs of TRL's kernel."""


def tree_row_logps(
    model: nn.Module,
    row: Mapping[str, torch.Tensor],
    *,
    temperature: float = 1.0,
    entropy: bool = True,
    mode: str = "two_pass",
    backend: str = "auto",
    checkpoint: str = "none",
    min_shared_tokens: int = DEFAULT_MIN_SHARED_TOKENS,
) -> TreeLogps:
    """Log-probs and entropies over one of TRL's tree rows, in its shape, without a copy of keys and values per path.

    The loss terms of the row are ``logps[row["token_index"]]``, as with the forward of TRL's AsyncGRPOTrainer: a token
    that several samples train on is computed once, and gathered once per sample. The numbers are those of each sample
    alone, to rounding. Models that TRL's own kernel does not support (recurrent and convolution layers, sinks) work.

    Args:
        model: Attached with `kvpref.attach`; may be wrapped in PEFT, DDP or FSDP2.
        row: The result of `trl.experimental.async_grpo.packing.TreeRow.pack`, on the model's device, of which
            ``input_ids``, ``shift_labels``, ``position_ids``, ``tree_kv_index``, ``tree_cu_seqlens_q`` and
            ``tree_cu_seqlens_k`` are read.
        temperature: Logits are divided by it.
        entropy: Whether entropies are computed.
        mode: As in `kvpref.response_logps`.
        backend: As in `kvpref.response_logps`.
        checkpoint: As in `kvpref.response_logps`.
        min_shared_tokens: Shared runs shorter than this are repeated.

    Returns:
        Log-probs and entropies, (N,) each, with gradient: at each position of the row those of the token that it
        predicts, 0 where ``shift_labels`` is -100.

    Raises:
        InputError: If the row is not one of TRL's; otherwise as `kvpref.response_logps`.
        UnsupportedModelError: As `kvpref.response_logps`.
    """
    head = HeadOptions(temperature=temperature, entropy=entropy)
    rows = TreeRows.read(row, min_shared_tokens)
    found = response_logps(model, rows.batch, mode=mode, backend=backend, checkpoint=checkpoint, head=head)
    return TreeLogps(rows.place(found.token_logps), None if found.entropy is None else rows.place(found.entropy))


def add_tree_row_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    mode: str,
) -> None:
    """kvpref's version of TRL's `add_fused_lm_head` for its AsyncGRPOTrainer.

    Args:
        model: The Hugging Face model, inside PEFT's wrapper if there is one. It is attached.
        temperature: The logits are divided by it.
        cast_lm_head_to_fp32: Must be False.
        outputs: ``log_probs`` and ``entropy``.
        mode: As in `kvpref.response_logps`.

    Raises:
        UnsupportedModelError: If the model would not be computed exactly.
        InputError: If TRL asks for a field that kvpref does not compute.
    """
    unknown = sorted(set(outputs) - {"log_probs", "entropy"})
    if unknown or cast_lm_head_to_fp32:
        raise InputError(f"kvpref does not compute {', '.join(unknown) or 'an LM head cast to fp32'} of tree rows")
    entropy = "entropy" in outputs
    serve(model, "fused_lm_head", partial(_tree_output, mode=mode, temperature=temperature, entropy=entropy))


def _tree_output(
    model: PreTrainedModel,
    *,
    mode: str,
    temperature: float,
    entropy: bool,
    **inputs: Any,
) -> FusedCausalLMOutput:
    names = (*NEEDED, "position_ids")
    refuse_inputs({name: value for name, value in inputs.items() if name not in (*names, *_LENGTHS)})
    # Tokens have a row dimension of size 1.
    row = {name: value.squeeze(0) if value.ndim == 2 else value for name, value in inputs.items() if name in names}
    found = tree_row_logps(Inside(model), row, mode=mode, temperature=temperature, entropy=entropy)
    mask = inputs["shift_labels"] != IGNORED_LABEL
    return FusedCausalLMOutput(
        loss=-found.logps.sum() / mask.sum().clamp(min=1),
        log_probs=found.logps.unsqueeze(0),
        entropy=None if found.entropy is None else found.entropy.unsqueeze(0),
        label_mask=mask,
    )
