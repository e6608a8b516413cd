"""`load_preferences`: a file or dataset to tokenized groups, with a report of what was left out or cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as AbstractSequence
from typing import TYPE_CHECKING, Any

from kvpref.data.dataset import DataOptions, PreferenceDataset
from kvpref.data.reading.columns import refuse_misnamed_images
from kvpref.data.reading.files import Source, read_rows, source_folder, source_name
from kvpref.data.reading.images.expansion import reads_images
from kvpref.data.reading.images.rows import RowImages
from kvpref.data.reading.messages import RowError
from kvpref.data.reading.raw_rows import RawRow
from kvpref.data.reading.rendering import RenderedRow, render_row
from kvpref.data.reading.response_spans import tokenizer_of
from kvpref.data.reading.rows import PreferenceRow, parse_row
from kvpref.data.reading.template_probes import TemplateProbes
from kvpref.data.reading.tokenization import SequenceTokenizer, TokenizedSequence
from kvpref.data.reading.truncation import check_prompt_fits, truncate_row
from kvpref.data.report import BadRow, DataReport, Notes
from kvpref.data.storage import PackedGroups
from kvpref.errors import InputError
from kvpref.records.groups import Group, Sequence
from kvpref.records.images import PlacedImage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

# One tokenizer call per so many texts or characters, whichever comes first: large enough to keep its threads busy,
# small enough that the offsets of long prompts (a tuple per token) stay below some hundred megabytes.
MAX_TEXTS_PER_CALL = 1000
MAX_CHARS_PER_CALL = 2_000_000


def load_preferences(
    data: Source, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, options: DataOptions | None = None
) -> PreferenceDataset:
    """Read, check and tokenize preference data.

    Args:
        data: A .jsonl, .json, .parquet or .arrow file, or a dataset folder or hub name, optionally with ``:split``; or
            rows in memory: a `datasets.Dataset`, or any iterable of dicts.
        tokenizer: A Hugging Face tokenizer, or the processor of a model that sees images. Rows of messages need its
            chat template.
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

    def __init__(self, data: Source, given: Any, options: DataOptions) -> None:
        self._data = source_name(data)
        self._options = options
        self._given = given
        self._tokenizer = SequenceTokenizer(tokenizer_of(given))
        self._images: RowImages | None = None
        if reads_images(given):
            self._images = RowImages(given, source_folder(data), options.max_image_pixels)
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
            if self._images is not None and not row.images:
                refuse_misnamed_images((*row.unread, *raw.left_out))
            rendered = self._render(row)
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

    def _render(self, row: PreferenceRow) -> RenderedRow:
        if self._images is None:
            if row.images:
                raise RowError(
                    "the row has images, and a tokenizer alone reads none; give the processor of a model that sees "
                    "images, or drop the images from the data to train on the text alone"
                )
            return render_row(row, self._given, self._probes)
        return self._images.write(render_row(row, self._given, self._probes))

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
            num_scaled_images=0 if self._images is None else self._images.num_scaled,
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
        if row.images:
            check_prompt_fits(sequences, self._options.max_prompt_tokens)
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
            [Sequence(item.input_ids, item.scored, self._place_images(row, item)) for item in truncated.sequences],
            scores=row.row.scores,
            ranks=row.row.ranks,
            labels=row.row.labels,
            id=location,
            columns=row.row.columns,
        )

    def _place_images(self, row: RenderedRow, sequence: TokenizedSequence) -> tuple[PlacedImage, ...]:
        if self._images is None:
            return ()
        return self._images.place(row.images, sequence.input_ids, sequence.num_prompt_tokens)

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
