"""The results of an evaluation: figures, intervals, and the table that `kvpref eval` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_Z_95 = 1.959964
"""Standard normal quantile of 0.975."""

_SHARES = ("accuracy", "accuracies")
"""Endings of the names of metrics that are shares of correct answers in a group."""

INTERVAL_METHOD = "Wilson score, 95%, groups as independent draws"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of a model on data."""

    model: str
    """Folder or hub name."""

    data: str
    """The data as named by the user."""

    loss: str
    """Name of the loss."""

    loss_args: Mapping[str, Any]
    """Its settings that differ from the defaults."""

    reference: str | None
    """The reference model; None if the loss reads no reference."""

    num_groups: int
    """Groups of the data."""

    num_counted: int
    """Groups that count for the loss."""

    num_responses: int
    """Number of computed responses."""

    metrics: Mapping[str, float]
    """Metrics by the names of `PreferenceTrainer.evaluate`."""

    counts_groups: bool
    """Whether metrics are means over groups, rather than over tokens or sequences."""

    @property
    def perplexity(self) -> float | None:
        """exp of the mean negative log-likelihood per token; None unless that is a mean over all tokens."""
        nll = None if self.counts_groups else self.metrics.get("eval_nll_per_token")
        return None if nll is None else math.exp(min(nll, 700.0))

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95% interval of each accuracy that is a mean over groups, by metric."""
        if not self.counts_groups:
            return {}
        return {
            name: wilson_interval(value, self.num_counted)
            for name, value in self.metrics.items()
            if name.endswith(_SHARES)
        }

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values, for files and scripts."""
        derived = {} if self.perplexity is None else {"eval_perplexity": self.perplexity}
        return {
            "model": self.model,
            "data": self.data,
            "loss": self.loss,
            "loss_args": dict(self.loss_args),
            "reference": self.reference,
            "num_groups": self.num_groups,
            "num_counted_groups": self.num_counted,
            "num_responses": self.num_responses,
            "metrics": {**self.metrics, **derived},
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "interval_method": INTERVAL_METHOD if self.intervals else None,
        }


def wilson_interval(share: float, num_groups: int) -> tuple[float, float]:
    """The 95% interval of a share found in `num_groups` independent groups: Wilson 1927, equation 3.

    A group with several pairs may be partly right; it varies less than one that is right or wrong, so the interval is
    then too wide rather than too narrow.

    Args:
        share: The share, in [0, 1].
        num_groups: Number of groups, at least 1.
    """
    spread = _Z_95**2 / num_groups
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * share * (1 - share) + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def print_evaluation(found: Evaluation) -> None:
    """Print the table on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    settings = ", ".join(f"{name}={value}" for name, value in found.loss_args.items())
    facts = {
        "model": found.model,
        "data": f"{found.data}, {found.num_groups} groups with {found.num_responses} responses",
        "loss": f"{found.loss}{f' with {settings}' if settings else ''}",
        **({} if found.reference is None else {"reference": found.reference}),
    }
    if found.num_counted != found.num_groups:
        facts["data"] += f", of which {found.num_counted} groups count for the loss"
    for name, text in facts.items():
        console.print(f"{name:<10} {text}", markup=False, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    intervals = found.intervals
    if intervals:
        table.add_column("95% interval", justify="right")
    values = {**found.metrics, **({} if found.perplexity is None else {"eval_perplexity": found.perplexity})}
    for name, value in values.items():
        row = [escape(name.removeprefix("eval_")), f"{value:.4f}"]
        if name in intervals:
            row.append("{:.4f} to {:.4f}".format(*intervals[name]))
        table.add_row(*row)
    console.print(table)
    if intervals:
        console.print(f"interval: {INTERVAL_METHOD}", highlight=False)
