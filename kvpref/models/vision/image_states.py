"""States of images for cross-attention layers (Mllama), as rows of features, one per placeholder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def states_of_images(model: Any, inputs: Mapping[str, Any], token_id: int) -> torch.Tensor:
    """(M, hidden_size * (1 + S)): for each image, the embedding of its placeholder and its states."""
    base = model.base_model
    made = base.multi_modal_projector(base.vision_model(**inputs).last_hidden_state)
    token = torch.tensor([token_id], device=made.device)
    embeds = model.get_input_embeddings()(token).expand(len(made), -1)
    return torch.cat([embeds, made.flatten(1)], dim=1)
