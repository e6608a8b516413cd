"""One rank's share of a pass whose row is split over several ranks.

Shape legend: T tokens of the pass, N ranks, R = ceil(T / N) rows of each, P predictor rows of the pass, Q the most
predictor rows on any rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from kvpref.plan.passes import PassPlan
from kvpref.records.host_copies import to_device


@dataclass(frozen=True, kw_only=True, eq=False)
class PassShare:
    """The part of a pass that one rank runs.

    Every rank holds R rows and reads Q of them, padding included, so that all ranks run the same operations; results
    at padding are not used.

    Attributes:
        item: The pass with this rank's tokens, positions and predictor rows (Q,). Its blocks cover the whole pass.
        first_row: Where this rank's rows begin in the pass.
        reads: (Q,) int64 on the host, which of the P predictor rows this rank reads.
        owners: (P,) int64 on the host, the rank that reads each predictor row.
        places: (P,) int64 on the host, its place among the Q rows of its owner.
    """

    item: PassPlan
    first_row: int
    reads: torch.Tensor
    owners: torch.Tensor
    places: torch.Tensor

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor with one entry per token, (..., T) -> (..., R); 0 at padding."""
        return _padded_rows(tensor, self.first_row, self.item.input_ids.shape[1])


def share_of(item: PassPlan, rank: int, num_ranks: int) -> PassShare:
    """The share of one rank.

    Args:
        item: A pass of one row.
        rank: From 0 to `num_ranks` - 1.
        num_ranks: N, how many ranks split the pass.
    """
    num_rows = -(-item.input_ids.shape[1] // num_ranks)
    assert item.predictor_rows_on_host is not None
    predictors = item.predictor_rows_on_host.cpu()
    owners = predictors // num_rows
    counts = torch.bincount(owners, minlength=num_ranks)
    by_owner = owners.argsort(stable=True)
    places = torch.empty_like(owners)
    places[by_owner] = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners[by_owner]]
    own = (owners == rank).nonzero().squeeze(1)
    padding = (0, int(counts.max()) - len(own))
    first_row = rank * num_rows
    local_rows = functional.pad(predictors[own] - first_row, padding)
    local = replace(
        item,
        input_ids=_padded_rows(item.input_ids, first_row, num_rows),
        position_ids=_padded_rows(item.position_ids, first_row, num_rows),
        predictor_rows=to_device(local_rows, item.predictor_rows.device),
        predictor_rows_on_host=local_rows,
    )
    return PassShare(item=local, first_row=first_row, reads=functional.pad(own, padding), owners=owners, places=places)


def _padded_rows(tensor: torch.Tensor, first: int, num_rows: int) -> torch.Tensor:
    own = tensor[..., first : first + num_rows]
    return functional.pad(own, (0, num_rows - own.shape[-1]))


def joined_reads(shares: Sequence[PassShare], num_predictors: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the predictor rows of several consecutive passes are read.

    Args:
        shares: This rank's share of each pass.
        num_predictors: P for each pass.

    Returns:
        The indices of this rank's rows among all predictor rows, (sum of Q,); and the place of every predictor row
        among the rows of all ranks, rank 0 first, (sum of P,). Both int64 on the host.
    """
    lengths = [len(share.reads) for share in shares]
    total = sum(lengths)
    reads, places = [], []
    first_read = first_place = 0
    for share, length, count in zip(shares, lengths, num_predictors, strict=True):
        reads.append(share.reads + first_read)
        places.append(share.owners * total + share.places + first_place)
        first_read += count
        first_place += length
    return torch.cat(reads), torch.cat(places)
