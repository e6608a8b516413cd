"""One pass of a model's layers, reading and leaving its keys and values."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from kvpref.models.backbone import max_attention_calls
from kvpref.models.both_ways import both_ways_of
from kvpref.models.participation import check_all_took_part
from kvpref.models.recomputation import recomputed_within
from kvpref.models.record import note_modules
from kvpref.models.rotary import long_frequencies
from kvpref.models.running_pass import RunningPass, bind_pass
from kvpref.models.support import require_passes
from kvpref.models.text_layers import PassExtras, run_backbone
from kvpref.plan.passes import PassPlan
from kvpref.state.cache import KeyValues


def run_level_pass(
    model: PreTrainedModel,
    item: PassPlan,
    embeds: torch.Tensor,
    key_values: KeyValues,
    *,
    num_positions: int,
    backend: str,
    keep: bool,
    extras: PassExtras | None = None,
) -> torch.Tensor:
    """Run one pass of the model's layers.

    Args:
        model: An attached model; this runs inside its forward.
        item: The pass, or this rank's share of it.
        embeds: (1, T, hidden_size), its input embeddings.
        key_values: What it reads, and where its own keys and values go.
        num_positions: Length of the longest sequence, in tokens.
        backend: Attention backend, or ``auto``.
        keep: Whether later passes will read this one's keys and values.
        extras: The experts' routers, images, and the ranks that share its rows.

    Returns:
        (1, T, hidden_size), the final hidden states.
    """
    require_passes(model)
    running = RunningPass(
        item,
        key_values,
        max_calls=max_attention_calls(model),
        num_positions=num_positions,
        backend=backend,
        keep=keep,
        both_ways=both_ways_of(model.config),
        exchange=None if extras is None else extras.exchange,
    )
    with long_frequencies(model, num_positions), bind_pass(running), recomputed_within(model, running):
        # A 2-D mask of ones keeps transformers from inferring packed sequences from the positions, wrongly here.
        ones = torch.ones_like(item.input_ids)
        hidden = run_backbone(model, item, embeds, ones, extras)
    modules = running.finish()
    check_all_took_part(model, modules)
    note_modules(modules)
    return hidden
