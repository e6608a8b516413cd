"""Tokenized groups as a data set, and the options of loading one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from kvpref.data.batching.lengths import GroupLengths, measure_group, repeat_short_beginning
from kvpref.data.batching.sharing import Clusters, as_wholes, find_clusters
from kvpref.data.report import DataReport
from kvpref.data.storage import PackedGroups
from kvpref.errors import InputError
from kvpref.records.groups import Group
from kvpref.records.images import Image

OnBadRow = Literal["stop", "skip"]


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

    def __post_init__(self) -> None:
        if isinstance(self.columns, str) or not all(isinstance(name, str) and name for name in self.columns):
            raise InputError(f"columns must be a list of names; got {self.columns!r}")
        for name in ("max_prompt_tokens", "max_response_tokens", "max_image_pixels"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise InputError(f"{name} must be at least 1, or None for no limit; got {limit}")
        if self.on_bad_row not in ("stop", "skip"):
            raise InputError(f"on_bad_row must be one of stop, skip; got {self.on_bad_row!r}")


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

    @cached_property
    def lengths(self) -> list[GroupLengths]:
        """Counts of tokens, attention pairs and scored tokens per group."""
        return [measure_group(group) for group in self]

    @property
    def images(self) -> tuple[Image, ...]:
        """Every image of a group, once."""
        return self._groups.images()

    def token_ids(self) -> set[int]:
        """Every token id that occurs in a group."""
        return self._groups.token_ids()

    def batching_lengths(self, min_shared_tokens: int, max_depth: int | None = None) -> list[GroupLengths]:
        """`lengths` as prefix trees under these limits come to: what is too short to be shared is repeated.

        Args:
            min_shared_tokens: As `kvpref.collate` takes it.
            max_depth: Likewise; 0 shares nothing.
        """
        least = sys.maxsize if max_depth == 0 else min_shared_tokens
        return [repeat_short_beginning(lengths, least) for lengths in self.lengths]

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
            self._clusters[key] = find_clusters(
                beginnings, groups_per_step=groups_per_step, min_shared_tokens=min_shared_tokens
            )
        return self._clusters[key]

    def map_groups(self, function: Callable[[Group], Group]) -> PreferenceDataset:
        """A new dataset of ``function(group)`` for every group, with the same report."""
        return PreferenceDataset((function(group) for group in self), report=self.report)
