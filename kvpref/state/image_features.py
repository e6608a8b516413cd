"""Features of images: what a vision tower leaves for the passes that read it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ImageFeatures(NamedTuple):
    """What the tower and projector make of images; R rows, one per placeholder.

    Attributes:
        features: (R, hidden_size), in place of embeddings.
        deepstack: (R, hidden_size) each, added to the hidden states of the first layers, one per layer.
    """

    features: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()
