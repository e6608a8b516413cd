"""Tokenized groups as a dataset, and the options of loading one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import Literal

from kvpref.data.batching.lengths import GroupLengths, SharingLimits, measure_group
from kvpref.data.batching.sharing import Clusters, as_wholes, find_clusters
from kvpref.data.mixing import copy_numbers, tell_copies_apart
from kvpref.data.reading.trajectories.attempts import TOKEN_WEIGHTS, TrajectoryGroups
from kvpref.data.report import DataReport
from kvpref.data.storage import PackedGroups
from kvpref.errors import InputError
from kvpref.records.groups import Group
from kvpref.records.images import Image

OnBadRow = Literal["stop", "skip"]
"""What a bad row does: ``stop`` loading with an error, or be skipped and listed in the report."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How rows become groups."""

    max_prompt_tokens: int | None = None
    """Keep the last so many prompt tokens (BOS stays in front and counts). None keeps all."""

    max_response_tokens: int | None = None
    """Keep the first so many response tokens, EOS included. None keeps all."""

    on_bad_row: OnBadRow = "stop"
    """``stop`` raises at the first bad row; ``skip`` leaves bad rows out and lists them in the report."""

    max_image_pixels: int | None = None
    """Scale images with more pixels down to so many, in their aspect ratio, before the processor sees them. None leaves
    their size to the processor's own limits."""

    columns: tuple[str, ...] = ()
    """Extra columns to keep with each group, for losses that read them; a row without one is a bad row."""

    group_by: str | None = None
    """The column whose value says which rows of one response each belong to a group, wherever they stand; None for the
    prompt. Such rows must then have the column, the same prompt as the others of their group, and no other shape."""

    trajectory_groups: TrajectoryGroups = "task"
    """What makes a group of trajectories: ``task``, the attempts at a task; or ``turn``, the answers that attempts give
    to the same history, each scored by the mean over the attempts that go through it."""

    trajectory_pairs: bool = False
    """Of each group of trajectories keep the best and the worst response by their scores, for losses on pairs; groups
    without two different scores are left out and counted."""

    split: str | None = None
    """Which part of a source is read, in the notation of `datasets`: ``train``, ``train[:1000]``, ``[10%:20%]``. It may
    also stand in the name of the source, behind a colon."""

    column_names: Mapping[str, str] = field(default_factory=dict)
    """By the name of a column that is read, the name that it has in the data."""

    data_weights: tuple[float, ...] | None = None
    """One number above 0 per source, in any unit: an epoch has as many groups as the sources have together, of which
    each gives its share, repeated or left out in part. None takes every group once."""

    seed: int = 42
    """Draws which groups of a source are repeated or left out, where there are weights."""

    def __post_init__(self) -> None:
        if isinstance(self.columns, str) or not all(isinstance(name, str) and name for name in self.columns):
            raise InputError(f"columns must be a list of names; got {self.columns!r}")
        if TOKEN_WEIGHTS in self.columns:
            raise InputError(
                f"column {TOKEN_WEIGHTS!r} weighs tokens under every loss; rename the one that a loss reads"
            )
        if self.group_by is not None and not (isinstance(self.group_by, str) and self.group_by):
            raise InputError(f"group_by must be the name of a column, or None; got {self.group_by!r}")
        if self.data_weights is not None and not all(0 < weight < inf for weight in self.data_weights):
            raise InputError(
                f"data_weights must be numbers above 0; got {self.data_weights!r}; leave a source out that is "
                "not to be read"
            )
        for name in ("max_prompt_tokens", "max_response_tokens", "max_image_pixels"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise InputError(f"{name} must be at least 1, or None for no limit; got {limit}")
        if self.on_bad_row not in ("stop", "skip"):
            raise InputError(f"on_bad_row must be one of stop, skip; got {self.on_bad_row!r}")
        if self.trajectory_groups not in ("task", "turn"):
            raise InputError(f"trajectory_groups must be one of task, turn; got {self.trajectory_groups!r}")


class PreferenceDataset:
    """Tokenized groups, indexable, cheap to pickle.

    Args:
        groups: The groups, in order.
        report: What loading left out; None for groups made in memory.

    Attributes:
        report: A `DataReport`, or None.
    """

    def __init__(self, groups: Iterable[Group], report: DataReport | None = None) -> None:
        self._groups = groups if isinstance(groups, PackedGroups) else PackedGroups(groups)
        self.report = report
        self._clusters: dict[tuple[int, int, bool], Clusters] = {}
        self._lengths: dict[SharingLimits, list[GroupLengths]] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Group:
        if not -len(self) <= index < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        return self._groups[index % len(self)]

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over tokens, scored flags, images, labels, scores, columns of all groups; the same everywhere."""
        return self._groups.fingerprint()

    @cached_property
    def digests(self) -> bytes:
        """`kvpref.data.digests.DIGEST_BYTES` per group, over what `fingerprint` is over."""
        return self._groups.digests()

    @property
    def lengths(self) -> list[GroupLengths]:
        """Counts of tokens, attention pairs and scored tokens per group, with all that is shared there once."""
        return self._measured(SharingLimits())

    @property
    def images(self) -> tuple[Image, ...]:
        """Every image of a group, once."""
        return self._groups.images()

    def token_ids(self) -> set[int]:
        """Every token id that occurs in a group."""
        return self._groups.token_ids()

    def batching_lengths(
        self, min_shared_tokens: int, max_depth: int | None = None, *, whole_segments: bool = False
    ) -> list[GroupLengths]:
        """`lengths` as prefix trees under these limits come to: what is too short to be shared is repeated.

        A depth of more than one leaves a level for what groups share with one another.

        Args:
            min_shared_tokens: As `kvpref.collate` takes it.
            max_depth: Likewise; 0 shares nothing.
            whole_segments: Whether sequences branch off at the ends of segments only, as where layers carry states.
        """
        depth = max_depth if max_depth is None or max_depth < 2 else max_depth - 1
        return self._measured(SharingLimits(min_shared_tokens, depth, whole_segments))

    def _measured(self, limits: SharingLimits) -> list[GroupLengths]:
        if limits not in self._lengths:
            self._lengths[limits] = [measure_group(group, limits) for group in self]
        return self._lengths[limits]

    @property
    def group_ids(self) -> list[str | None]:
        """The id of every group, for error messages."""
        return [self._groups.id_of(index) for index in range(len(self))]

    def clusters(self, groups_per_step: int, min_shared_tokens: int, *, whole_prompts: bool = False) -> Clusters:
        """Which groups begin alike and belong into one step; see `find_clusters`. Computed once per arguments.

        Args:
            groups_per_step: As `find_clusters` takes it.
            min_shared_tokens: Likewise.
            whole_prompts: Only prompts that are the same to their end count as alike.
        """
        key = (groups_per_step, min_shared_tokens, whole_prompts)
        if key not in self._clusters:
            beginnings = [self._groups.beginning_of(index) for index in range(len(self))]
            if whole_prompts:
                beginnings = as_wholes(beginnings)
            beginnings = list(map(tell_copies_apart, beginnings, copy_numbers(self.group_ids)))
            self._clusters[key] = find_clusters(
                beginnings, groups_per_step=groups_per_step, min_shared_tokens=min_shared_tokens
            )
        return self._clusters[key]

    def map_groups(self, function: Callable[[Group], Group]) -> PreferenceDataset:
        """A new dataset of ``function(group)`` for every group, with the same report."""
        return PreferenceDataset((function(group) for group in self), report=self.report)
