"""The loss interface: a pure function of log-probs and a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from kvpref.errors import InputError
from kvpref.losses.learning_rates import REWARD_RATES, UNKNOWN_RATES, UNKNOWN_REWARD_RATES, LearningRates
from kvpref.plan.batch import Batch, collate
from kvpref.records.groups import Group
from kvpref.records.outputs import ResponseLogps, ResponseRewards
from kvpref.records.requests import READS, HeadOptions


class LossOutput(NamedTuple):
    """What a loss returns.

    Attributes:
        loss: () scalar to minimise: a mean over the loss's units (`num_units`).
        metrics: Name -> () scalar without gradient, means over the same units, for logging.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


LossFunction = Callable[[Any, Any, Batch], Any]
"""Any callable ``loss(policy, reference, batch) -> LossOutput``, or the loss alone if it has no metrics.

`PreferenceLoss` adds what the trainer can use.
"""


class Idle(NamedTuple):
    """Why nothing can be learned from a group.

    Attributes:
        reason: What is wrong, to follow "in these groups".
        remedy: How to mend the data or the settings.
    """

    reason: str
    remedy: str


NO_UNITS = Idle("the loss counts nothing", "give data that the loss reads; see its num_units")


class Groups(Protocol):
    """Groups by index: a list or a dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Group: ...

    def __iter__(self) -> Iterator[Group]: ...


class PreferenceLoss:
    """Base of the losses that kvpref ships. A plain function is a loss too; see `kvpref.loss`.

    Attributes:
        needs_reference: Whether the loss reads reference log-probs; the trainer then computes them once.
        reads: ``tokens``: log-probs of scored tokens, a `ResponseLogps`. ``ends``: rewards, a `ResponseRewards`.
        unit: What the loss is a mean over. Losses with different units cannot be mixed.
        head: What the LM head computes besides log-probs.
        columns: Extra columns of the data that the loss reads.
        learning_rates: The trainer's default learning rates for this loss.
        couples_groups: Whether the loss of a micro-batch is more than a mean over its groups, so that how a step is
            cut into micro-batches changes it.
        reads_pairs: Whether each group must be two responses of which one is preferred. Trajectory data then yields
            the best and the worst attempt at each task.
    """

    needs_reference: bool = False
    reads: str = "tokens"
    unit: str = "groups"
    learning_rates: LearningRates = UNKNOWN_RATES
    couples_groups: bool = False
    reads_pairs: bool = False

    @property
    def head(self) -> HeadOptions:
        return HeadOptions()

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        """Compute the loss of a micro-batch.

        Args:
            policy: Log-probs of the model that is trained, with what `head` asks for.
            reference: Log-probs of the reference model, or None if none are needed.
            batch: The groups, with their scores, labels and columns.

        Raises:
            InputError: If the batch lacks what the loss needs; the message names the group.
        """
        raise NotImplementedError

    def num_units(self, batch: Batch) -> float:
        """The number of units that the loss is a mean over; for tokens with weights, the sum of the weights.

        The trainer weights micro-batches and ranks by it, so that the loss of an optimizer step is the mean over all
        its units, however they were split.
        """
        return sum(map(self.group_units, batch.groups))

    def group_units(self, group: Group) -> float:
        """How many of the units belong to a group: 1, unless overridden."""
        return 1

    def idle(self, group: Group) -> Idle | None:
        """Why there is nothing to learn from a group; None if there is something."""
        if type(self).num_units is PreferenceLoss.num_units:
            return None if self.group_units(group) else NO_UNITS
        return None if self.num_units(collate([group])) else NO_UNITS

    def caution(self, group: Group) -> str | None:
        """What may not be meant about learning from a group, and what to do, to follow "in these groups"; or None."""
        return None

    @property
    def can_be_idle(self) -> bool:
        """Whether there can be groups with nothing to learn or with a caution, so that looking for them makes sense."""
        names = ("idle", "group_units", "num_units", "caution")
        return any(getattr(type(self), name) is not getattr(PreferenceLoss, name) for name in names)

    def select(self, group: Group) -> Group:
        """Keep only the sequences that the loss reads, so that no others are computed."""
        return group

    def prepare(self, groups: Groups) -> Iterable[Group]:
        """The groups to train on, as many and in the same order: `select` of each, unless overridden.

        For losses that need sequences no group has by itself. Preparing twice must give the same as preparing once.

        Raises:
            InputError: If the data lacks what the loss needs; the message names the group.
        """
        return map(self.select, groups)

    def prepare_batch(self, batch: Batch) -> None:
        """Let the batch build what the loss reads besides log-probs, with `Batch.tensors` or numeric columns.

        Called while batches are collated, ahead of use; the loss then waits neither for lists to become tensors nor for
        copies to the device. A loss that does not override this is still correct.

        Raises:
            InputError: If the batch lacks what the loss needs; the loss must raise the same when it is called.
        """
        for name in self.columns:
            for as_numbers in (batch.sequence_column, batch.token_column):
                with contextlib.suppress(InputError):  # columns of other kinds are left to the loss
                    as_numbers(name)
                    break


class RewardLoss(PreferenceLoss):
    """Base of the losses of reward models: a mean over groups of a function of rewards."""

    reads = "ends"
    learning_rates = REWARD_RATES

    def __call__(self, policy: ResponseRewards, reference: None, batch: Batch) -> LossOutput:  # type: ignore[override]
        raise NotImplementedError


class FunctionLoss(PreferenceLoss):
    """A user's function as a loss: a mean over groups, with the needs that its attributes declare.

    Args:
        function: The loss, possibly inside `functools.partial`. If it has attributes `needs_reference`, `head`,
            `columns` and `reads`, they mean the same as in `PreferenceLoss`.

    Raises:
        InputError: If it declares anything else.
    """

    def __init__(self, function: LossFunction) -> None:
        self.function = function
        declared: Any = function
        while isinstance(declared, partial):  # attributes set by hand
            declared = declared.func
        self.__name__ = getattr(declared, "__name__", type(declared).__name__)
        self.needs_reference = bool(getattr(declared, "needs_reference", False))
        self.reads = getattr(declared, "reads", "tokens")
        self._head: HeadOptions = getattr(declared, "head", HeadOptions())
        self._columns = _column_names(getattr(declared, "columns", ()))
        _check_reads(self.reads)
        self.learning_rates = UNKNOWN_REWARD_RATES if self.reads == "ends" else UNKNOWN_RATES
        if not isinstance(self._head, HeadOptions):
            raise InputError(f"loss {self.__name__!r}: head must be a kvpref.HeadOptions; got {self._head!r}")

    @property
    def head(self) -> HeadOptions:
        return self._head

    @property
    def columns(self) -> tuple[str, ...]:
        return self._columns

    def __call__(self, policy: Any, reference: Any, batch: Batch) -> LossOutput:
        output: Any = self.function(policy, reference, batch)
        if isinstance(output, torch.Tensor):
            return LossOutput(output, {})
        if isinstance(output, LossOutput) and isinstance(output.metrics, dict):
            # Plain numbers are metrics too; anything else is reported where outputs are checked.
            numbers = {name: value for name, value in output.metrics.items() if isinstance(value, int | float)}
            return output._replace(
                metrics=output.metrics | {name: torch.tensor(float(numbers[name])) for name in numbers}
            )
        return output


def as_loss(loss: PreferenceLoss | LossFunction) -> PreferenceLoss:
    """Wrap a plain function; return a `PreferenceLoss` unchanged."""
    return loss if isinstance(loss, PreferenceLoss) else FunctionLoss(loss)


def loss(
    *,
    needs_reference: bool = False,
    columns: tuple[str, ...] | list[str] = (),
    reads: str = "tokens",
    **head: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare what a loss function needs: ``@kvpref.loss(needs_reference=True, entropy=True, columns=["weight"])``.

    Args:
        needs_reference: Whether to pass it the reference's log-probs.
        columns: Extra columns of the data that it reads, with `Batch.column` and the like.
        reads: ``tokens``, or ``ends`` for the rewards of a model with a scalar head.
        **head: Fields of `kvpref.HeadOptions`: ``entropy``, ``hidden``, ``values``, ``logit_ids``, ``temperature``, ...

    Raises:
        InputError: If there is no such field, or `reads` is unknown.
    """
    options, names = _head_options(head), _column_names(columns)
    _check_reads(reads)

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        for name, value in (
            ("needs_reference", needs_reference),
            ("columns", names),
            ("reads", reads),
            ("head", options),
        ):
            setattr(function, name, value)
        return function

    return declare


def loss_name(loss: PreferenceLoss | LossFunction) -> str:
    """A loss's name in messages: that of the function or of the class."""
    return str(getattr(loss, "__name__", type(loss).__name__))


def _check_reads(reads: str) -> None:
    if reads not in READS:
        raise InputError(f"unknown reads {reads!r}; choose from: {', '.join(READS)}")


def _column_names(columns: Any) -> tuple[str, ...]:
    if isinstance(columns, str) or not all(isinstance(name, str) for name in columns):
        raise InputError(f"columns must be a list of names; got {columns!r}")
    return tuple(columns)


def _head_options(given: dict[str, Any]) -> HeadOptions:
    valid = [item.name for item in fields(HeadOptions)]
    unknown = [name for name in given if name not in valid]
    if unknown:
        raise InputError(
            f"kvpref.loss has no setting {unknown[0]!r}; it has: needs_reference, columns, reads, {', '.join(valid)}"
        )
    if "logit_ids" in given:
        given = {**given, "logit_ids": tuple(given["logit_ids"])}
    return HeadOptions(**given)
