"""Whether the losses of an optimizer step are finite: the one thing in it that the host waits for the device to say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from kvpref.training.loading.inputs import StepInputs
from kvpref.training.step_runner import StepResult


class LossCheck:
    """Keeps the losses of batched steps, unread, until the weights are about to change."""

    def __init__(self) -> None:
        self._unread: list[tuple[StepResult, StepInputs]] = []

    def add(self, result: StepResult, inputs: StepInputs) -> None:
        """Keep a batched step's losses."""
        self._unread.append((result, inputs))

    def find_not_finite(self) -> tuple[float, str] | None:
        """The first loss kept since the last call that is NaN or infinite, and which groups are to blame."""
        unread, self._unread = self._unread, []
        values = iter(read_losses([output.loss for result, _ in unread for output in result.outputs]))
        for result, inputs in unread:
            # No longer than the micro-batches of this step.
            losses = [value for _, value in zip(result.outputs, values, strict=False)]
            found = next(_not_finite(result, losses, inputs), None)
            if found is not None:
                return found
        return None


def weights_are_finite(model: nn.Module) -> bool:
    """Whether no trained weight, of those on this rank, is NaN or infinite."""
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    # Of sharded ones the own part: other ranks may not ask.
    own = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in trained]
    return all(bool(weight.isfinite().all()) for weight in own)


def read_losses(losses: Sequence[torch.Tensor]) -> list[float]:
    """The values of () losses, in one copy to the host: here, and nowhere else in a step, it waits for the device."""
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
