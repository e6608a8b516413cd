"""The groups of ranks that share micro-batches (`sequence_parallel`)."""

from __future__ import annotations

from torch import distributed, nn

from kvpref.errors import UnsupportedModelError
from kvpref.parallel.sequence import sequence_parallel, sequence_ranks


def split_over_ranks(model: nn.Module, num_ranks: int) -> None:
    """Split the passes of a model over this rank's group of `num_ranks` consecutive ranks.

    All ranks must call this, in the same order relative to other collective calls.

    Raises:
        UnsupportedModelError: If the model cannot be split.
    """
    if num_ranks > 1:
        group, _ = distributed.new_subgroups(num_ranks)
        sequence_parallel(model, group)


def split_alike(reference: nn.Module, policy: nn.Module) -> None:
    """Split a reference model like the policy if it runs on the same kind of device; otherwise each rank runs it whole.

    Raises:
        UnsupportedModelError: If it cannot be split.
    """
    ranks = sequence_ranks(policy)
    if ranks is None:
        return
    try:
        sequence_parallel(reference, ranks.group)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"reference_model: {error}") from error
