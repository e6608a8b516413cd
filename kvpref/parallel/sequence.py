"""Long prompts over ranks: a group of ranks shares each micro-batch and splits the row of every pass.

Each rank runs embeddings, norms, projections and MLPs on its own rows. Inside the attention function ranks exchange
(own rows, all heads) for (all rows, own heads) and back, as in DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv
2309.14509); the cascade runs on the whole row. So keys and values that later passes read, and their gradients, stay
split by heads. A rank's gradients are those of its own rows; the sum over the group is the gradient.

Shape legend: T tokens of a pass, N ranks, R = ceil(T / N) rows of each, H heads, G key/value heads, D and E head dims
of keys and values.
"""

from __future__ import annotations

from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from kvpref.errors import InputError, UnsupportedModelError
from kvpref.models.attention_shapes import attention_shapes
from kvpref.models.compilation import is_compiled
from kvpref.models.mixers.forwards import find_mixers
from kvpref.models.support import is_padded_only, unwrap
from kvpref.parallel.sharding import is_sharded
from kvpref.plan.passes import PassPlan
from kvpref.plan.shares import PassShare, share_of

M = TypeVar("M", bound=nn.Module)


class SequenceRanks:
    """The ranks that share the rows of a model's passes, from the view of one of them.

    Args:
        group: Their process group.

    Attributes:
        rank: This rank's place in the group.
        size: N, the number of ranks in the group.
    """

    def __init__(self, group: distributed.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self._shares: WeakKeyDictionary[PassPlan, PassShare] = WeakKeyDictionary()

    def share(self, item: PassPlan) -> PassShare:
        """This rank's share of a pass; planned once."""
        if item not in self._shares:
            # Inference mode's tensors may not be read by a later backward pass.
            with torch.inference_mode(False):
                self._shares[item] = share_of(item, self.rank, self.size)
        return self._shares[item]

    def to_heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From own rows with all heads to all rows with own heads, in one exchange.

        Args:
            query: (R, H, D).
            key: (R, G, D).
            value: (R, G, E).
            num_rows: T, the rows of the pass.

        Returns:
            (T, H / N, D), (T, G / N, D) and (T, G / N, E).

        Raises:
            UnsupportedModelError: If the heads cannot be split evenly.
        """
        check_heads(query.shape[1], key.shape[1], self.size)
        tensors = (query, key, value)
        widths = [tensor.shape[1] // self.size * tensor.shape[2] for tensor in tensors]
        # (N, R, width): what goes to each rank.
        parts = [tensor.reshape(-1, self.size, width) for tensor, width in zip(tensors, widths, strict=True)]
        rows = _Exchange.apply(torch.cat(parts, dim=2).transpose(0, 1), self.group)
        rows = rows.flatten(0, 1)[:num_rows]
        q, k, v = (
            part.unflatten(1, (-1, tensor.shape[2]))
            for part, tensor in zip(rows.split(widths, dim=1), tensors, strict=True)
        )
        return q, k, v

    def to_rows(self, out: torch.Tensor) -> torch.Tensor:
        """From all rows with own heads, (T, H / N, E), back to own rows with all heads, (R, H, E)."""
        num_rows, num_heads, head_dim = out.shape
        missing = -num_rows % self.size
        if missing:
            out = functional.pad(out, (0, 0, 0, 0, 0, missing))
        parts = _Exchange.apply(out.reshape(self.size, -1, num_heads * head_dim), self.group)
        rows: torch.Tensor = parts.transpose(0, 1).reshape(-1, self.size * num_heads, head_dim)
        return rows

    def own_heads(self, per_head: torch.Tensor) -> torch.Tensor:
        """This rank's part of one number per head, (H,) -> (H / N,)."""
        return per_head.tensor_split(self.size)[self.rank]

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The values of all ranks, (Q, ...) each -> (N * Q, ...), rank 0's first.

        All ranks must compute the same from them: a rank's gradient comes only from its own values.
        """
        gathered: torch.Tensor = _Gather.apply(values, self)
        return gathered


class _Exchange(torch.autograd.Function):
    """(N, ...): part i goes to rank i, and part i of the result comes from rank i. It is its own transpose."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchanged(grad, ctx.group), None


def _exchanged(parts: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
    received = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
    distributed.all_to_all_single(received, parts.contiguous(), group=group)
    return received


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, ranks: SequenceRanks) -> torch.Tensor:
        ctx.rank, ctx.num_rows = ranks.rank, values.shape[0]
        gathered = values.new_empty(ranks.size, *values.shape)
        distributed.all_gather(list(gathered.unbind(0)), values.contiguous(), group=ranks.group)
        return gathered.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad[ctx.rank * ctx.num_rows : (ctx.rank + 1) * ctx.num_rows], None


_ranks: WeakKeyDictionary[nn.Module, SequenceRanks] = WeakKeyDictionary()
"""Keyed by the Hugging Face model inside wrappers: process groups can be neither copied nor pickled with a model."""


def sequence_parallel(model: M, group: distributed.ProcessGroup | None) -> M:
    """Split every pass of a model over the ranks of a group, which all run the same micro-batches.

    Each rank then holds the activations of its share of the rows, and keys and values of prefixes for its share of the
    heads. Every engine function returns on every rank what one process returns. Gradients of parameters are those of
    the rank's own rows: without a wrapper, call `sum_sequence_gradients` after the last backward pass. Wrappers (DDP,
    FSDP2) average over all their ranks, so weight the loss as usual, by the group's share of the data times the number
    of all ranks.

    Args:
        model: Attached or not, possibly wrapped.
        group: The ranks, such as ``torch.distributed.new_subgroups(4)[0]``; None to run alone again.

    Returns:
        The same model.

    Raises:
        InputError: If this process is not in the group.
        UnsupportedModelError: If the model's heads cannot be split over this many ranks, or its layers mix rows
            other than by attention.
    """
    inner = unwrap(model)
    if group is None or distributed.get_world_size(group) == 1:
        _ranks.pop(inner, None)
        return model
    if distributed.get_rank(group) < 0:
        raise InputError("sequence_parallel needs a process group that this process is in; make it with new_subgroups")
    check_splits(inner, distributed.get_world_size(group))
    _ranks[inner] = SequenceRanks(group)
    return model


def sequence_ranks(model: nn.Module) -> SequenceRanks | None:
    """The ranks that a model's passes are split over; None if it runs alone."""
    return _ranks.get(unwrap(model)) if _ranks else None


def check_splits(model: nn.Module, num_ranks: int) -> None:
    """Raise UnsupportedModelError if passes of a model cannot be split over this many ranks."""
    inner = unwrap(model)
    if is_padded_only(inner.config):
        raise UnsupportedModelError(
            f"sequence_parallel splits kvpref's passes, and {type(inner).__name__} runs in mode 'padded' only"
        )
    for name, module, _ in find_mixers(inner):
        raise UnsupportedModelError(
            f"sequence_parallel splits rows, and {name} ({type(module).__name__}) carries a state from row to row; "
            "train this model without"
        )
    for shape in attention_shapes(inner):
        check_heads(shape.num_heads, shape.num_kv_heads, num_ranks)


def check_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> None:
    """Raise UnsupportedModelError if heads cannot be split evenly over this many ranks."""
    if num_heads % num_ranks or num_kv_heads % num_ranks:
        raise UnsupportedModelError(
            f"sequence_parallel {num_ranks} gives each rank its own attention heads, and a layer of this model has "
            f"{num_heads} query heads and {num_kv_heads} key/value heads; choose a number that divides both"
        )


def check_options(model: nn.Module, *, mode: str, has_images: bool, balances_experts: bool) -> None:
    """Check that the requested options work if the model is split over ranks.

    Raises:
        InputError: If they do not.
    """
    if sequence_ranks(model) is None:
        return
    for what, is_set in (
        ("mode 'padded', whose rows are not passes", mode == "padded"),
        ("images", has_images),
        ("router_aux_loss_coef, a loss of all rows", balances_experts),
        ("compiled layers (compile_layers, torch_compile)", is_compiled(model)),
    ):
        if is_set:
            raise InputError(f"sequence_parallel does not go with {what}; leave one of them out")


def sum_sequence_gradients(model: nn.Module) -> None:
    """Add up the parameters' gradients over the ranks that a model's passes are split over.

    For a model without a wrapper, once after the last backward pass of a step, on all ranks of the group. Does nothing
    if the model is not split.

    Raises:
        InputError: If a wrapper reduces gradients itself.
    """
    ranks = sequence_ranks(model)
    if ranks is None:
        return
    if isinstance(model, DistributedDataParallel) or is_sharded(model):
        raise InputError(
            f"{type(model).__name__} reduces gradients over all its ranks itself; sum_sequence_gradients is for models "
            "without a wrapper"
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        return
    # Some ranks may have none where others do, such as for an expert that none of their rows chose.
    has_grad = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.uint8)
    has_grad = has_grad.to(trained[0].device)
    distributed.all_reduce(has_grad, distributed.ReduceOp.MAX, group=ranks.group)
    for parameter, is_used in zip(trained, has_grad.tolist(), strict=True):
        if is_used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad, group=ranks.group)
