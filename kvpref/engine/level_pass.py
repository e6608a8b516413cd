"""One pass of a model's layers, with its keys and values read from and left where they wait."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from kvpref.models.attention import RunningPass, bind_pass
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
) -> torch.Tensor:
    """Run one pass of the model's layers.

    Args:
        model: Attached model, in whose forward this runs.
        item: The pass.
        embeds: (1, T, hidden_size), its input embeddings.
        key_values: What it reads, and where its own keys and values go.
        num_positions: Length of the longest sequence, in tokens.
        backend: Attention backend, or ``auto``.
        keep: Whether later passes will read this one's keys and values.

    Returns:
        (1, T, hidden_size), the final hidden states.
    """
    running = RunningPass(
        item,
        key_values,
        num_layers=model.config.num_hidden_layers,
        num_positions=num_positions,
        backend=backend,
        keep=keep,
    )
    with bind_pass(running):
        # A 2-D mask of ones keeps transformers from guessing packed sequences from the positions, wrongly here.
        hidden = run_backbone(model, item, embeds, attention_mask=torch.ones_like(item.input_ids))
    running.finish()
    return hidden


def run_backbone(
    model: PreTrainedModel, item: PassPlan, embeds: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """The final hidden states of a pass, (B, T, hidden_size)."""
    output = model.base_model(
        inputs_embeds=embeds,
        position_ids=item.position_ids,
        attention_mask=attention_mask,
        use_cache=False,
        return_dict=True,
    )
    hidden: torch.Tensor = output.last_hidden_state
    return hidden
