"""`load_preferences`: a file or dataset to tokenized groups, with a report of what was left out or cut."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from kvpref.data.batching.lengths import GroupLengths, measure_group, repeat_short_beginning
from kvpref.data.batching.sharing import Clusters, find_clusters
from kvpref.data.reading.files import Source, read_rows, source_name
from kvpref.data.reading.messages import RowError
from kvpref.data.reading.raw_rows import RawRow
from kvpref.data.reading.rendering import RenderedRow, render_row
from kvpref.data.reading.rows import PreferenceRow, parse_row
from kvpref.data.reading.template_probes import TemplateProbes
from kvpref.data.reading.tokenization import SequenceTokenizer, TokenizedSequence
from kvpref.data.reading.truncation import truncate_row
from kvpref.data.report import BadRow, DataReport, Notes
from kvpref.data.storage import PackedGroups
from kvpref.errors import InputError
from kvpref.records.groups import Group, Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnBadRow = Literal["stop", "skip"]

# One tokenizer call per so many texts or characters, whichever comes first: large enough to keep its threads busy,
# small enough that the offsets of long prompts (a tuple per token) stay below some hundred megabytes.
MAX_TEXTS_PER_CALL = 1000
MAX_CHARS_PER_CALL = 2_000_000


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How rows become groups."""

    max_prompt_tokens: int | None = None
    """Keep the last so many prompt tokens (BOS stays in front and counts). None keeps all."""

    max_response_tokens: int | None = None
    """Keep the first so many response tokens, EOS included. None keeps all."""

    on_bad_row: OnBadRow = "stop"
    """``stop`` raises at the first bad row; ``skip`` leaves bad rows out and lists them in the report."""

    columns: tuple[str, ...] = ()
    """Extra columns to keep with each group, for losses that read them; a row without one is a bad row."""

    def __post_init__(self) -> None:
        if isinstance(self.columns, str) or not all(isinstance(name, str) and name for name in self.columns):
            raise InputError(f"columns must be a list of names; got {self.columns!r}")
        for name in ("max_prompt_tokens", "max_response_tokens"):
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
        self._clusters: dict[tuple[int, int], Clusters] = {}

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
        """Hex SHA-256 over token ids, scored flags, labels, scores and columns of every group; the same everywhere."""
        return self._groups.fingerprint()

    @cached_property
    def digests(self) -> bytes:
        """`kvpref.data.digests.DIGEST_BYTES` per group, over what `fingerprint` is over."""
        return self._groups.digests()

    @cached_property
    def lengths(self) -> list[GroupLengths]:
        """Counts of tokens, attention pairs and scored tokens per group."""
        return [measure_group(group) for group in self]

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

    def clusters(self, groups_per_step: int, min_shared_tokens: int) -> Clusters:
        """Which groups begin alike and belong into one step; see `find_clusters`. Computed once per arguments."""
        key = (groups_per_step, min_shared_tokens)
        if key not in self._clusters:
            beginnings = [self._groups.beginning_of(index) for index in range(len(self))]
            self._clusters[key] = find_clusters(
                beginnings, groups_per_step=groups_per_step, min_shared_tokens=min_shared_tokens
            )
        return self._clusters[key]

    def map_groups(self, function: Callable[[Group], Group]) -> PreferenceDataset:
        """A new dataset of ``function(group)`` for every group, with the same report."""
        return PreferenceDataset((function(group) for group in self), report=self.report)


def load_preferences(
    data: Source, tokenizer: PreTrainedTokenizerBase, options: DataOptions | None = None
) -> PreferenceDataset:
    """Read, check and tokenize preference data.

    Args:
        data: A .jsonl, .json, .parquet or .arrow file, or a dataset folder or hub name, optionally with ``:split``; or
            rows in memory: a `datasets.Dataset`, or any iterable of dicts.
        tokenizer: A Hugging Face tokenizer. Rows of messages need its chat template.
        options: Limits, and what to do with bad rows; `DataOptions()` if None.

    Returns:
        One group per good row, with the row's location as its id. A pair gives ``labels=(True, False)``.

    Raises:
        InputError: If the source cannot be read, is empty or holds only bad rows; at the first bad row unless they
            are to be skipped; if rows hold messages and the tokenizer has no chat template.
    """
    options = options or DataOptions()
    loader = _Loader(data, tokenizer, options)
    for row in read_rows(data, options.columns):
        loader.add(row)
    return loader.finish()


class _Loader:
    """Turns raw rows into groups, a tokenizer call at a time, and keeps the report's counts."""

    def __init__(self, data: Source, tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> None:
        self._data = source_name(data)
        self._options = options
        self._tokenizer = SequenceTokenizer(tokenizer)
        self._probes = TemplateProbes()
        self._pending: list[tuple[str, RenderedRow]] = []
        self._pending_texts = 0
        self._pending_chars = 0
        self._groups = PackedGroups()
        self._bad_rows: list[BadRow] = []
        self._num_rows = 0
        self._truncation: Counter[str] = Counter()
        self._notes = Notes()

    def add(self, raw: RawRow) -> None:
        self._num_rows += 1
        self._notes.unread.update(raw.left_out)
        try:
            if raw.error is not None:
                raise RowError(raw.error)
            row = parse_row(raw.value, self._options.columns)
            rendered = render_row(row, self._tokenizer.tokenizer, self._probes)
        except RowError as error:
            # Rows before this one may turn out bad when they are tokenized, and the first bad row is to be named.
            self._flush()
            self._reject(raw.location, str(error))
            return
        except InputError as error:
            raise InputError(f"{raw.location}: {error}") from error
        self._pending.append((raw.location, rendered))
        self._pending_texts += len(rendered.texts)
        self._pending_chars += sum(map(len, rendered.texts))
        if self._pending_texts >= MAX_TEXTS_PER_CALL or self._pending_chars >= MAX_CHARS_PER_CALL:
            self._flush()

    def finish(self) -> PreferenceDataset:
        self._flush()
        if not self._num_rows:
            raise InputError(f"{self._data}: the data is empty; expected at least one row")
        if not len(self._groups):
            first = self._bad_rows[0]
            raise InputError(
                f"{first.location}: {first.reason}; all {self._num_rows} rows of {self._data} are bad, of which this "
                "is the first: check the fields' names and types"
            )
        report = DataReport(
            source=self._data,
            num_rows=self._num_rows,
            num_groups=len(self._groups),
            bad_rows=tuple(self._bad_rows),
            notices=self._notes.lines(),
            **self._truncation,
        )
        return PreferenceDataset(self._groups, report)

    def _flush(self) -> None:
        pending, self._pending, self._pending_texts, self._pending_chars = self._pending, [], 0, 0
        if not pending:
            return
        tokenized = self._tokenizer.tokenize([row for _, row in pending])
        for (location, row), sequences in zip(pending, tokenized, strict=True):
            try:
                if isinstance(sequences, RowError):
                    raise sequences
                self._groups.append(self._build_group(location, row, sequences))
                self._notes.add(row.row)
            except RowError as error:
                self._reject(location, str(error))

    def _build_group(self, location: str, row: RenderedRow, sequences: list[TokenizedSequence]) -> Group:
        truncated = truncate_row(
            sequences,
            max_prompt_tokens=self._options.max_prompt_tokens,
            max_response_tokens=self._options.max_response_tokens,
            bos_token_id=self._tokenizer.bos_token_id,
        )
        if row.row.labels is not None and truncated.sequences[0].input_ids == truncated.sequences[1].input_ids:
            raise RowError(
                "`chosen` and `rejected` have the same tokens"
                + (" after truncation; raise max_response_tokens" if truncated.num_truncated_responses else "")
            )
        _check_token_columns(row.row, sequences, truncated.sequences)
        self._truncation["num_truncated_prompts"] += truncated.prompt_tokens_cut > 0
        self._truncation["prompt_tokens_cut"] += truncated.prompt_tokens_cut
        self._truncation["num_truncated_responses"] += truncated.num_truncated_responses
        self._truncation["response_tokens_cut"] += truncated.response_tokens_cut
        return Group(
            [Sequence(sequence.input_ids, sequence.scored) for sequence in truncated.sequences],
            scores=row.row.scores,
            ranks=row.row.ranks,
            labels=row.row.labels,
            id=location,
            columns=row.row.columns,
        )

    def _reject(self, location: str, reason: str) -> None:
        if self._options.on_bad_row == "stop":
            raise InputError(f"{location}: {reason}; correct the row, or pass --on-bad-row skip to leave bad rows out")
        self._bad_rows.append(BadRow(location, reason))


def _check_token_columns(
    row: PreferenceRow, whole: AbstractSequence[TokenizedSequence], kept: AbstractSequence[TokenizedSequence]
) -> None:
    """Refuse a column whose entries would fall on other tokens than they were made for.

    Losses read one number per scored token. Which of the entries to drop where a response is cut, or where some of
    its tokens are not scored, only users know.

    Raises:
        RowError: Naming the column.
    """
    for name, value in row.columns.items():
        if not isinstance(value, list) or len(value) != len(whole):
            continue
        for index, (entry, before, after) in enumerate(zip(value, whole, kept, strict=True)):
            if not isinstance(entry, list):
                continue
            num_tokens = len(before.input_ids) - before.num_prompt_tokens
            num_before, num_after = (sum(item.scored) for item in (before, after))
            if num_after < num_before == len(entry):
                raise RowError(
                    f"column `{name}` has an entry for each of the {num_before} tokens of response {index}, which is "
                    f"cut to {num_after}; raise max_response_tokens, or shorten the response and its column in the data"
                )
            if num_before < num_tokens == len(entry):
                raise RowError(
                    f"column `{name}` has an entry for each of the {num_tokens} tokens of response {index}, of which "
                    f"{num_before} are scored; leave out the entries of what tools and users say inside it"
                )
