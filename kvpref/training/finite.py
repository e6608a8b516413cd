"""Whether the losses of an optimizer step are finite: the only answer that the host waits for in a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kvpref.errors import SharedRunError
from kvpref.losses import PreferenceLoss, loss_name
from kvpref.parallel.agreement import agreement
from kvpref.parallel.gathering import gather
from kvpref.training.loading.inputs import StepInputs
from kvpref.training.saving import what_is_left
from kvpref.training.step_runner import StepResult


@dataclass(frozen=True, kw_only=True)
class NotFinite:
    """A loss that is not finite, and what is known about it."""

    value: float
    """The loss: NaN or infinite."""

    where: str
    """The groups to blame, and the rank if there are several."""

    weights_are_finite: bool
    """Whether no trained weight of any rank is NaN or infinite."""


def _found_on_any_rank(own: tuple[float, str] | None, model: nn.Module) -> NotFinite | None:
    """The finding of the first rank with a non-finite loss; the same on all ranks, which all have to call this.

    A rank that stopped alone would leave the others waiting.

    Args:
        own: As `LossCheck.find_not_finite` returns it.
        model: The model whose weights are then checked.
    """
    if not agreement().any(own is not None):
        return None
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    ranks = gather((own, weights_are_finite(model)), world_size)
    rank, (value, where) = next((index, found) for index, (found, _) in enumerate(ranks) if found is not None)
    return NotFinite(
        value=value,
        where=where if len(ranks) == 1 else f"on rank {rank}, {where}",
        weights_are_finite=all(is_finite for _, is_finite in ranks),
    )


class LossCheck:
    """Keeps the losses of batched steps, unread, until the weights are about to change."""

    def __init__(self) -> None:
        self._unread: list[tuple[StepResult, StepInputs]] = []

    def add(self, result: StepResult, inputs: StepInputs) -> None:
        """Keep a batched step's losses."""
        self._unread.append((result, inputs))

    def stop_if_not_finite(self, model: nn.Module, loss: PreferenceLoss, step: int, output_dir: str | None) -> None:
        """Raise RunError if a loss kept on any rank is NaN or infinite; all ranks have to call this, and all raise.

        Args:
            model: The model whose weights are about to change.
            loss: For the message.
            step: The optimizer step, for the message.
            output_dir: Where checkpoints are, for the message.
        """
        found = _found_on_any_rank(self.find_not_finite(), model)
        if found is None:
            return
        what, go_on = what_is_left(output_dir)
        state = f"the weights were not changed by this step and {what}"
        if not found.weights_are_finite:
            state = "weights are not finite since an earlier step, nor are they in checkpoints written since then"
            go_on = "start again, or resume from a checkpoint before that"
        raise SharedRunError(
            f"loss {loss_name(loss)!r}: the loss is {found.value} at optimizer step {step}: {found.where}; {state}. "
            f"Lower the learning rate or look at those rows, then {go_on}"
        )

    def find_not_finite(self) -> tuple[float, str] | None:
        """The first non-finite loss since the last call, and the groups to blame; None if all are finite."""
        unread, self._unread = self._unread, []
        values = iter(read_losses([output.loss for result, _ in unread for output in result.outputs]))
        for result, inputs in unread:
            # Not kept beyond this step.
            losses = [value for _, value in zip(result.outputs, values, strict=False)]
            found = next(_not_finite(result, losses, inputs), None)
            if found is not None:
                return found
        return None


def weights_are_finite(model: nn.Module) -> bool:
    """Whether no trained weight on this rank is NaN or infinite."""
    trained = [(parameter, parameter.detach()) for parameter in model.parameters() if parameter.requires_grad]
    # Only the local part of sharded weights: other ranks may not be calling this.
    own = [
        weight.to_local() if hasattr(weight, "to_local") else getattr(item, "ds_tensor", weight)
        for item, weight in trained
    ]
    return all(bool(weight.isfinite().all()) for weight in own)


def read_losses(losses: Sequence[torch.Tensor]) -> list[float]:
    """The values of () losses, in one copy to the host, the only place in a step where it waits for the device."""
    return torch.stack([loss.float() for loss in losses]).tolist()


def _not_finite(result: StepResult, losses: list[float], inputs: StepInputs) -> Iterator[tuple[float, str]]:
    for value, sums, item in zip(losses, result.sequence_values, inputs, strict=True):
        if value - value == 0:
            continue
        batch = item.batch
        what = "rewards" if batch.reads.kind == "ends" else "log-probs"
        bad = {int(batch.group_index[i]) for i in torch.nonzero(~torch.isfinite(sums.cpu())).flatten().tolist()}
        if bad:
            ids = ", ".join(str(batch.groups[index].id) for index in sorted(bad)[:5])
            yield value, f"the {what} of {ids} are not finite"
        else:
            ids = ", ".join(str(group.id) for group in batch.groups[:3])
            yield value, f"all {what} are finite in this micro-batch, which starts with {ids}"
