"""The head on the hidden states that predict scored tokens, also if they are spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from kvpref.models.head import head_outputs
from kvpref.parallel.sequence import sequence_ranks
from kvpref.plan.passes import PassPlan
from kvpref.plan.shares import joined_reads
from kvpref.records.host_copies import to_device
from kvpref.records.requests import HeadOptions


def read_rows(
    model: PreTrainedModel,
    passes: Sequence[PassPlan],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    options: HeadOptions,
    *,
    in_place: bool = False,
) -> dict[str, torch.Tensor]:
    """The outputs of the model's head for the predictor rows of some passes.

    If ranks share the rows, each runs the head on its own rows, and every rank gets all results.

    Args:
        model: An attached model; this runs inside its forward.
        passes: The whole passes, not this rank's shares.
        hidden: Their hidden states on this rank, pass after pass.
        targets: (U,) int64, the tokens that all predictor rows predict, pass after pass.
        options: As for `head_outputs`.
        in_place: As for `head_outputs`.

    Returns:
        Outputs as from `head_outputs`, U values each, in the order of `targets`.
    """
    ranks = sequence_ranks(model)
    if ranks is None:
        return head_outputs(model, hidden, targets, options, in_place=in_place)
    counts = [item.predictor_rows.shape[0] for item in passes]
    reads, places = (
        to_device(index, hidden.device) for index in joined_reads([ranks.share(item) for item in passes], counts)
    )
    found = head_outputs(model, hidden, targets.index_select(0, reads), options, in_place=in_place)
    return {name: ranks.gather(values).index_select(0, places) for name, values in found.items()}
