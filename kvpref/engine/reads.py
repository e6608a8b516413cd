"""Which hidden states of a model a loss reads, and which tokens the model lets see one another in both directions."""

from __future__ import annotations

from torch import nn

from kvpref.errors import InputError
from kvpref.models.both_ways import both_ways_of
from kvpref.models.mixers.kinds import has_mixers
from kvpref.models.output_layer import is_reward_model
from kvpref.models.positions import check_tokens
from kvpref.models.rotary import check_lengths
from kvpref.models.support import unwrap
from kvpref.models.vision.support import check_images
from kvpref.plan.batch import Batch
from kvpref.plan.passes import Reads


def batch_for(model: nn.Module, batch: Batch, reads: str) -> Batch:
    """The batch with plans that read what the loss reads from this model.

    Raises:
        InputError: If the model does not have the head for it.
        UnsupportedModelError: If lengths of sequences lead to different rotary embeddings, or the model is not known to
            be exact with the batch's images.
    """
    check_lengths(unwrap(model), batch.groups)
    check_tokens(unwrap(model), batch.groups)
    if batch.images:
        check_images(unwrap(model), batch.images)
    return batch.reading(reads_of(model, reads))


def reads_of(model: nn.Module, reads: str) -> Reads:
    """Which hidden states are read for ``tokens`` (log-probs) or ``ends`` (rewards) of a model.

    Raises:
        InputError: If the model does not have the head for it.
    """
    inner = unwrap(model)
    if reads == "ends" and not is_reward_model(inner):
        raise InputError(
            f"rewards need a model with a scalar head; {type(inner).__name__} has none. Load it with "
            "AutoModelForSequenceClassification and num_labels=1"
        )
    if reads == "tokens" and is_reward_model(inner):
        raise InputError(
            f"log-probs need a language model; {type(inner).__name__} has a scalar head instead of an LM head. Use a "
            "loss on rewards, such as bradley_terry, or kvpref.response_rewards"
        )
    # Nested configs keep it in the text config.
    pad_token_id = getattr(inner.config.get_text_config(), "pad_token_id", None)
    return Reads(
        kind=reads,
        pad_token_id=pad_token_id if reads == "ends" else None,
        spans=both_ways_of(inner.config).spans,
        states=has_mixers(inner),
    )
