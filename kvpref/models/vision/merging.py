"""What images add to passes: features in place of embeddings, and extra inputs of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from kvpref.models.vision.cross_attention import CrossImages
from kvpref.models.vision.families import family_of
from kvpref.models.vision.positions import ImagePositions
from kvpref.plan.batch import ImageInputs
from kvpref.plan.passes import PassPlan
from kvpref.records.groups import Sequence as TokenSequence
from kvpref.records.images import Image
from kvpref.state.image_features import FeatureSource


class PassImages:
    """The images of a batch, or of a step, as its passes need them.

    Args:
        model: The model.
        features: The table that the plan's `image_index` points into.
        sequences: The sequences of the batch or step.
        inputs: The tower's inputs by image key.
        images: The images of the table, in order.
        keeps: Whether the graphs of all passes are kept together, so that keys and values of images can be shared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        features: FeatureSource,
        sequences: Sequence[TokenSequence],
        inputs: Mapping[str, ImageInputs],
        images: Sequence[Image],
        *,
        keeps: bool = False,
    ) -> None:
        self.features = features
        self._positions = ImagePositions(model, sequences, inputs)
        is_beside = family_of(model).cross_attention
        self._cross = CrossImages(model, sequences, inputs, images, keeps=keeps) if is_beside else None

    def merge(self, item: PassPlan, embeds: torch.Tensor) -> torch.Tensor:
        """The embeddings of a pass, with features in place of placeholders.

        Args:
            item: The pass.
            embeds: (B, T, hidden_size).
        """
        if not item.image_rows.numel():
            return embeds
        # If layers cross-attend to images, the states follow the embedding.
        rows = self.features.rows(0, item.image_index)[:, : embeds.shape[-1]].to(embeds.dtype)
        return embeds.flatten(0, 1).index_copy(0, item.image_rows, rows).view_as(embeds)

    def layer_inputs(self, item: PassPlan) -> dict[str, Any]:
        """Keyword arguments for the stack of layers: positions if the model computes its own, deepstack features."""
        found: dict[str, Any] = {} if self._cross is None else self._cross.layer_inputs(item, self.features)
        positions = self._positions.of_pass(item)
        if positions is not None:
            found["position_ids"] = positions
        if self.features.num_tensors > 1 and item.image_rows.numel():
            places = torch.zeros_like(item.input_ids, dtype=torch.bool)
            places.view(-1)[item.image_rows] = True
            found["visual_pos_masks"] = places
            found["deepstack_visual_embeds"] = [
                self.features.rows(number, item.image_index) for number in range(1, self.features.num_tensors)
            ]
        return found
