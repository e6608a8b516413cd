"""Raw rows of one source to tokenized groups, with a report of what was left out or cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvpref.data.dataset import DataOptions
from kvpref.data.reading.columns import refuse_misnamed_images
from kvpref.data.reading.files import Source, source_folder, source_name
from kvpref.data.reading.gathering import SingleRow, SingleRows, group_name, join_singles
from kvpref.data.reading.images.expansion import reads_images
from kvpref.data.reading.images.rows import RowImages
from kvpref.data.reading.messages import MissingFieldError, RowError
from kvpref.data.reading.raw_rows import RawRow
from kvpref.data.reading.rendering import RenderedRow, render_row
from kvpref.data.reading.response_spans import tokenizer_of
from kvpref.data.reading.rows import PreferenceRow, parse_row
from kvpref.data.reading.shapes.conversations import as_trajectory, is_conversation
from kvpref.data.reading.template_probes import TemplateProbes
from kvpref.data.reading.token_columns import check_token_columns
from kvpref.data.reading.token_weights import has_token_weights, with_token_weights
from kvpref.data.reading.tokenization import SequenceTokenizer, TokenizedSequence
from kvpref.data.reading.trajectories.attempts import TOKEN_WEIGHTS, TURN_SCORES
from kvpref.data.reading.trajectories.calls import Call, gather, is_call, parse_call
from kvpref.data.reading.trajectories.groups import Limits, build_groups
from kvpref.data.reading.trajectories.pairs import best_and_worst
from kvpref.data.reading.trajectories.rows import has_trajectories, parse_trajectories
from kvpref.data.reading.trajectories.tasks import RenderedTask, render_task
from kvpref.data.reading.trajectories.writing import AttemptWriter
from kvpref.data.reading.truncation import check_prompt_fits, truncate_row
from kvpref.data.report import COUNTED, BadRow, DataReport, Notes, gathering_notices, trajectory_notices
from kvpref.data.storage import PackedGroups
from kvpref.errors import InputError
from kvpref.records.groups import Group, Sequence
from kvpref.records.images import PlacedImage

if TYPE_CHECKING:
    pass

# One tokenizer call per so many texts or characters, whichever comes first: large enough to keep its threads busy,
# small enough that the offsets of long prompts (a tuple per token) stay below some hundred megabytes.
MAX_TEXTS_PER_CALL = 1000
MAX_CHARS_PER_CALL = 2_000_000


class GroupLoader:
    """Turns raw rows into groups, a tokenizer call at a time, and keeps the report's counts."""

    def __init__(self, data: Source, given: Any, options: DataOptions, groups: PackedGroups) -> None:
        self._data = source_name(data)
        self._options = options
        self._given = given
        self._tokenizer = SequenceTokenizer(tokenizer_of(given))
        self._images: RowImages | None = None
        if reads_images(given):
            self._images = RowImages(given, source_folder(data), options.max_image_pixels)
        self._probes = TemplateProbes()
        self._writer = AttemptWriter(given, self._probes, with_questions=options.trajectory_groups == "turn")
        self._calls: dict[str, list[Call]] = {}  # by task; its rows may stand anywhere
        self._singles = SingleRows(options.group_by)
        self._task_ids: set[str | None] = set()  # of rows of trajectories
        self._pending: list[tuple[str, RenderedRow | RenderedTask]] = []
        self._pending_texts = 0
        self._pending_chars = 0
        self._groups = groups
        self._num_before = len(groups)  # of other sources
        self._bad_rows: list[BadRow] = []
        self._num_rows = 0
        self._counts: Counter[str] = Counter()
        self._notes = Notes()

    def add(self, raw: RawRow) -> None:
        self._num_rows += 1
        self._notes.unread.update(raw.left_out)
        self._queue(raw.location, lambda: self._read(raw))

    def _queue(self, location: str, read: Callable[[], RenderedRow | RenderedTask | None]) -> None:
        """Keep what is to be tokenized; a row that cannot be read is a bad row."""
        try:
            rendered = read()
        except RowError as error:
            # Rows before this one may turn out bad when they are tokenized, and the first bad row is to be named.
            self._flush()
            self._reject(error.location or location, str(error))
            return
        except InputError as error:
            raise InputError(f"{location}: {error}") from error
        if rendered is None:
            return
        self._pending.append((location, rendered))
        self._pending_texts += len(rendered.texts)
        self._pending_chars += sum(map(len, rendered.texts))
        if self._pending_texts >= MAX_TEXTS_PER_CALL or self._pending_chars >= MAX_CHARS_PER_CALL:
            self._flush()

    def _read(self, raw: RawRow) -> RenderedRow | RenderedTask | None:
        """The texts of a row; None where it is a call or a single response, which waits for the others."""
        if raw.error is not None:
            raise RowError(raw.error)
        value, columns = raw.value, self._options.columns
        if isinstance(value, dict) and is_conversation(value):
            value = as_trajectory(value)
        if has_token_weights(value):
            columns = (*columns, TOKEN_WEIGHTS)
        if isinstance(value, dict) and has_trajectories(value):
            self._refuse_grouping("the row holds whole conversations")
            task = parse_trajectories(value, columns)
            self._counts["num_same_id"] += task.id is not None and task.id in self._task_ids
            self._task_ids.add(task.id)
            return render_task(task, self._writer, self._options.trajectory_groups)
        if isinstance(value, dict) and is_call(value):
            self._refuse_grouping("the row is a call of a model, which `id` gathers")
            call = parse_call(value, raw.location, columns)
            self._calls.setdefault(call.task, []).append(call)
            return None
        try:
            row = parse_row(value, columns, self._options.group_by)
        except MissingFieldError as error:
            moved = "".join(f"; `{own}` is read as `{name}` (--column {name}={own})" for own, name in raw.moved)
            raise RowError(f"{error}{moved}") from error
        if self._images is not None and not row.images:
            refuse_misnamed_images((*row.unread, *raw.left_out))
        if not row.is_single:
            self._refuse_grouping(f"the row has {len(row.responses)} responses of its own")
            return self._render(row)
        assert isinstance(value, dict)
        self._singles.add(raw.location, row, value)
        return None

    def _refuse_grouping(self, reason: str) -> None:
        if self._options.group_by is not None:
            raise RowError(
                f"{reason}, and `{self._options.group_by}` gathers rows of one response each; leave --group-by out"
            )

    def _join(self, members: list[SingleRow]) -> RenderedRow:
        joined = join_singles(members, self._options.group_by)
        if len(members) > 1 or joined.scores is not None:
            self._counts["num_single_rows"] += len(members)
            self._counts["num_gathered"] += 1
        return self._render(joined)

    def _gather(self, calls: list[Call]) -> RenderedTask:
        task = gather(calls, by_turn=TURN_SCORES in self._options.columns)
        return render_task(task, self._writer, self._options.trajectory_groups)

    def _render(self, row: PreferenceRow) -> RenderedRow:
        if self._images is None:
            if row.images:
                raise RowError(
                    "the row has images, and a tokenizer alone reads none; give the processor of a model that sees "
                    "images, or drop the images from the data to train on the text alone"
                )
            return render_row(row, self._given, self._probes)
        return self._images.write(render_row(row, self._given, self._probes))

    def finish(self) -> DataReport:
        for calls in self._calls.values():
            self._queue(calls[0].location, lambda calls=calls: self._gather(calls))  # type: ignore[misc]
        for members in self._singles.groups():
            self._queue(group_name(members), lambda members=members: self._join(members))  # type: ignore[misc]
        self._flush()
        num_groups = len(self._groups) - self._num_before
        if not self._num_rows:
            raise InputError(f"{self._data}: the data is empty; expected at least one row")
        if not num_groups and self._counts["num_equal"]:
            raise InputError(
                f"{self._data}: the loss compares two responses, and no group of trajectories has two different "
                "scores; correct the scores, or take another loss"
            )
        if not num_groups and self._counts["num_single"]:
            raise InputError(
                f"{self._data}: there is no history that attempts of a task share and then answer differently; give "
                "trajectory_groups=task to compare whole attempts"
            )
        if not num_groups:
            first = self._bad_rows[0]
            raise InputError(
                f"{first.location}: {first.reason}; all {self._num_rows} rows of {self._data} are bad, of which this "
                "is the first: check the fields' names and types"
            )
        return DataReport(
            source=self._data,
            num_rows=self._num_rows,
            num_groups=num_groups,
            bad_rows=tuple(self._bad_rows),
            notices=(
                *self._notes.lines(),
                *gathering_notices(self._counts, self._options.group_by),
                *trajectory_notices(self._counts),
            ),
            num_scaled_images=0 if self._images is None else self._images.num_scaled,
            **{name: self._counts[name] for name in COUNTED},
        )

    def _flush(self) -> None:
        pending, self._pending, self._pending_texts, self._pending_chars = self._pending, [], 0, 0
        if not pending:
            return
        tokenized = self._tokenizer.tokenize([row for _, row in pending])
        for (location, row), sequences in zip(pending, tokenized, strict=True):
            try:
                if isinstance(sequences, RowError):
                    raise sequences
                if isinstance(row, RenderedTask):
                    self._add_task(location, row, sequences)
                else:
                    self._groups.append(with_token_weights(self._build_group(location, row, sequences)))
                    self._notes.add(location, row.row)
            except RowError as error:
                self._reject(error.location or location, str(error))

    def _add_task(self, location: str, task: RenderedTask, sequences: list[TokenizedSequence]) -> None:
        limits = Limits(
            self._options.max_prompt_tokens, self._options.max_response_tokens, self._tokenizer.bos_token_id
        )
        groups, counts = build_groups(task, sequences, location, limits)
        for group in map(with_token_weights, groups):
            kept = best_and_worst(group) if self._options.trajectory_pairs else group
            if kept is not None:
                self._groups.append(kept)
            if self._options.trajectory_pairs:
                counts["num_equal" if kept is None else "num_pairs"] += 1
        self._counts += counts
        self._notes.unread.update(task.task.unread)

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
            why = "; the tokenizer does not tell their texts apart"
            if truncated.num_truncated_responses:
                why = " after truncation; raise max_response_tokens"
            raise RowError(f"`chosen` and `rejected` have the same tokens{why}")
        check_token_columns(row.row, sequences, truncated.sequences)
        self._counts["num_truncated_prompts"] += truncated.prompt_tokens_cut > 0
        self._counts["prompt_tokens_cut"] += truncated.prompt_tokens_cut
        self._counts["num_truncated_responses"] += truncated.num_truncated_responses
        self._counts["response_tokens_cut"] += truncated.response_tokens_cut
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
