"""Moves groups between ranks as long as that makes a step cheaper.

A local search that starts from a good plan. What ranks wait for is a *load*: of a rank, if they wait at the end of the
step, or of one micro-batch, phase by phase. A step costs the sum of the greatest loads over its rounds (one, if they
wait at the end) and phases. So the search takes something from the place with the greatest load of a round and phase,
and moves it where that phase has slack, or swaps it for something there, so that no greatest load rises.
Groups of one cluster in a micro-batch stay together.

Its time is bounded by the number of groups: an exchange looks at few places, and the number of exchanges is limited.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

from kvpref.data.batching.dealing import cost_of_runs, step_cost
from kvpref.data.batching.group_costs import GroupCosts, Phases, Runs, Waits

_CLOSE_ENOUGH = 1 / 512
"""The search ends once a step costs at most this much more than the least possible."""

_PLACES = 6
"""Places per round, those with the least load, that are searched for an exchange."""

_NEIGHBOURS = 3
"""Candidates to take in exchange, on either side of the best size."""

_EXCHANGES_PER_UNIT = 2
"""Most exchanges of a search, per unit."""


class _Unit(NamedTuple):
    """Groups that move together."""

    phases: Phases
    tokens: int
    groups: tuple[int, ...]
    place: int
    """The micro-batch it is in."""


class _Exchange(NamedTuple):
    """An exchange between the place with the greatest load of a phase and another place."""

    phase: int
    source: int
    target: int
    slack: float
    """How far the target's load may rise."""
    least: float
    """Improvements below this do not count."""


def balance(ranks: Sequence[Runs], costs: GroupCosts, waits: Waits) -> list[Runs]:
    """The same groups in equally many micro-batches per rank, at no higher cost of the step; for modes without padding.

    Args:
        ranks: Per rank its micro-batches, the same number on each, none empty.
        costs: The costs of all groups; micro-batches keep its budget.
        waits: Where ranks wait for one another.
    """
    if len(ranks) == 1:
        return list(ranks)
    search = _Search(ranks, costs, waits)
    search.run()
    found = search.ranks()
    # The search treats phases as sums, which is not quite true if groups share beginnings.
    return min((found, list(ranks)), key=lambda plan: _step_cost(plan, costs, waits))


class _Search:
    """Places are micro-batches, counted rank by rank; cells have loads: a place, or all places of a rank."""

    def __init__(self, ranks: Sequence[Runs], costs: GroupCosts, waits: Waits) -> None:
        self._costs = costs
        # If ranks wait in every pass, what two groups share takes a separate pass on every rank.
        self._apart = waits == "pass" and costs.clusters is not None
        self._per_rank = len(ranks[0])
        self._cell_size = self._per_rank if waits == "step" else 1
        self._num_rounds = 1 if waits == "step" else self._per_rank
        places = [run for rank in ranks for run in rank]
        self._cells: list[list[_Unit]] = [[] for _ in range(len(places) // self._cell_size)]
        self._rooms: list[float] = []
        self._counts: list[int] = []
        for place, run in enumerate(places):
            units = [_unit(groups, place, costs, waits) for groups in _units_of(run, costs)]
            self._cells[place // self._cell_size] += units
            self._rooms.append(costs.budget - sum(unit.tokens for unit in units))
            self._counts.append(len(units))
        self._loads = [[sum(column) for column in zip(*(u.phases for u in cell), strict=True)] for cell in self._cells]
        self._phases = range(len(self._loads[0]))
        # (load, cell) by round and phase, sorted.
        self._sorted = [[self._column(number, phase) for phase in self._phases] for number in range(self._num_rounds)]
        self._enough = sum(map(sum, self._loads)) / len(ranks) * (1 + _CLOSE_ENOUGH)
        self._num_exchanges = _EXCHANGES_PER_UNIT * sum(self._counts)

    def run(self) -> None:
        """Exchange until nothing helps."""
        stuck: set[tuple[int, int]] = set()
        for _ in range(self._num_exchanges):
            greatest = [
                (loads[-1][0], number, phase)
                for number, columns in enumerate(self._sorted)
                for phase, loads in enumerate(columns)
            ]
            if sum(load for load, _, _ in greatest) <= self._enough:
                return
            free = [entry for entry in greatest if entry[1:] not in stuck]
            if not free:
                return
            _, number, phase = max(free)
            if not self._lower(number, phase):
                stuck.add((number, phase))

    def ranks(self) -> list[Runs]:
        """The current plan."""
        places: Runs = [[] for _ in self._rooms]
        for cell in self._cells:
            for unit in cell:
                places[unit.place] += unit.groups
        size = self._per_rank
        return [places[start : start + size] for start in range(0, len(places), size)]

    def _column(self, number: int, phase: int) -> list[tuple[float, int]]:
        cells = range(number, len(self._cells), self._num_rounds)
        return sorted((self._loads[cell][phase], cell) for cell in cells)

    def _lower(self, number: int, phase: int) -> bool:
        """Try to lower the greatest load of a round and phase without raising another; returns whether it succeeded."""
        greatest, source = self._sorted[number][phase][-1]
        slacks = [
            (columns[phase][-1][0] - load, cell)
            for columns in self._sorted
            for load, cell in columns[phase][:_PLACES]
            if cell != source
        ]
        # Less than this is rounding, or not worth a move.
        least = greatest * _CLOSE_ENOUGH / 4
        for slack, target in sorted(slacks, reverse=True)[:_PLACES]:
            if slack <= 2 * least:
                break
            exchange = _Exchange(phase, source, target, slack, least)
            found = self._best(exchange)
            if found is not None:
                self._swap(exchange, *found)
                return True
        return False

    def _best(self, exchange: _Exchange) -> tuple[_Unit, _Unit | None] | None:
        """What to give, and what to take for it, if anything, so that about half of the slack moves."""
        phase, half = exchange.phase, exchange.slack / 2
        best: tuple[_Unit, _Unit | None] | None = None
        error = half - exchange.least
        there = sorted(self._cells[exchange.target], key=lambda unit: unit.phases[phase])
        sizes = [unit.phases[phase] for unit in there]
        for given in self._cells[exchange.source]:
            size = given.phases[phase]
            if size < exchange.least:
                continue
            at = bisect_left(sizes, size - half)
            for taken in (None, *there[max(0, at - _NEIGHBOURS) : at + _NEIGHBOURS]):
                moved = size if taken is None else size - taken.phases[phase]
                if abs(moved - half) < error and self._may(exchange, given, taken):
                    best, error = (given, taken), abs(moved - half)
        return best

    def _may(self, exchange: _Exchange, given: _Unit, taken: _Unit | None) -> bool:
        """Whether budgets hold, no place is left empty, and no greatest load of another phase rises."""
        if taken is None:
            if self._counts[given.place] == 1 or self._rooms[self._roomiest(exchange.target)] < given.tokens:
                return False
            if self._apart and self._meets(given, self._roomiest(exchange.target)):
                return False
        else:
            if self._apart and (self._meets(given, taken.place) or self._meets(taken, given.place)):
                return False
            more = given.tokens - taken.tokens
            if given.place == taken.place or self._rooms[taken.place] < more or self._rooms[given.place] < -more:
                return False
        for phase in self._phases:
            moved = given.phases[phase] - (0.0 if taken is None else taken.phases[phase])
            gains, change = (exchange.target, moved) if moved > 0 else (exchange.source, -moved)
            if phase != exchange.phase and self._loads[gains][phase] + change > self._greatest(gains, phase):
                return False
        return True

    def _meets(self, unit: _Unit, place: int) -> bool:
        """Whether a unit would join another of its cluster."""
        cluster_of, own = self._costs.cluster_of, self._costs.cluster_of(unit.groups[0])
        cell = self._cells[place // self._cell_size]
        return any(other.place == place and cluster_of(other.groups[0]) == own for other in cell)

    def _greatest(self, cell: int, phase: int) -> float:
        return self._sorted[cell % self._num_rounds][phase][-1][0]

    def _roomiest(self, cell: int) -> int:
        first = cell * self._cell_size
        return max(range(first, first + self._cell_size), key=self._rooms.__getitem__)

    def _swap(self, exchange: _Exchange, given: _Unit, taken: _Unit | None) -> None:
        place = self._roomiest(exchange.target) if taken is None else taken.place
        self._put(given, place)
        if taken is not None:
            self._put(taken, given.place)

    def _put(self, unit: _Unit, place: int) -> None:
        source, target = unit.place // self._cell_size, place // self._cell_size
        self._cells[source].remove(unit)
        self._cells[target].append(unit._replace(place=place))
        for sign, at, cell in ((-1, unit.place, source), (1, place, target)):
            self._rooms[at] -= sign * unit.tokens
            self._counts[at] += sign
            for phase, columns in enumerate(self._sorted[cell % self._num_rounds]):
                load = self._loads[cell][phase]
                del columns[bisect_left(columns, (load, cell))]
                self._loads[cell][phase] = load + sign * unit.phases[phase]
                insort(columns, (self._loads[cell][phase], cell))


def _step_cost(ranks: Sequence[Runs], costs: GroupCosts, waits: Waits) -> float:
    if waits == "step":
        return step_cost([[costs.run_phases(run, waits) for run in rank] for rank in ranks], waits)
    return cost_of_runs([run for rank in ranks for run in rank], costs, len(ranks), waits)


def _unit(groups: list[int], place: int, costs: GroupCosts, waits: Waits) -> _Unit:
    fixed = costs.cost_model.per_micro_batch
    *others, last = costs.run_phases(groups, waits)
    return _Unit((*others, last - fixed), costs.run_tokens(groups), tuple(groups), place)


def _units_of(run: Sequence[int], costs: GroupCosts) -> list[list[int]]:
    """The groups of a micro-batch, with those of a cluster together."""
    units: dict[int, list[int]] = {}
    for group in run:
        units.setdefault(costs.cluster_of(group), []).append(group)
    return list(units.values())
