"""What a resumed run is compared with: how many processes ran it, and which tokens it was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from kvpref.atomic_files import write_text
from kvpref.cli.checkpoints import RECORD_FILE
from kvpref.cli.given_data import GivenData
from kvpref.data import PreferenceDataset
from kvpref.data.digests import describe_difference
from kvpref.errors import InputError

_READS_THE_DATE = "strftime_now"
"""What chat templates call the function that writes the date."""


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """One dataset of a run."""

    source: str
    """As the user named it."""

    file_hash: str | None
    """Of the bytes of each file; None where the data is not files alone."""

    digests: str
    """Hexadecimal `PreferenceDataset.digests`."""

    @classmethod
    def of(cls, given: GivenData, groups: PreferenceDataset) -> DataRecord:
        """The record of data as it is now."""
        files = given.files()
        file_hash = None if files is None else " ".join(map(_hash_file, files))
        return cls(source=str(given), file_hash=file_hash, digests=groups.digests.hex())


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Beside `RunConfig`: what a run found when it began."""

    world_size: int
    """Number of processes."""

    day: str
    """The date of its first start, for chat templates that write it."""

    chat_template: str | None
    """A hash of the tokenizer's chat template."""

    data: dict[str, DataRecord]
    """By name: data, eval_data."""

    @classmethod
    def of(cls, world_size: int, tokenizer: Any, data: Mapping[str, tuple[GivenData, PreferenceDataset]]) -> RunRecord:
        """The record of a run as it is now."""
        template = _template(tokenizer)
        return cls(
            world_size=world_size,
            day=date.today().isoformat(),
            chat_template=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
            data={name: DataRecord.of(given, groups) for name, (given, groups) in data.items()},
        )

    @classmethod
    def read(cls, output: Path) -> RunRecord | None:
        """The record in an output folder; None if there is none.

        Raises:
            InputError: If it cannot be read.
        """
        path = output / RECORD_FILE
        try:
            values = json.loads(path.read_text())
            data = {name: DataRecord(**item) for name, item in values.pop("data").items()}
            return cls(**values, data=data)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise InputError(
                f"{path}: cannot read what this run was trained on: {error}; start a new run with another --output"
            ) from error

    def save(self, output: Path) -> None:
        """Write it; a run that is killed meanwhile leaves what was there."""
        write_text(output / RECORD_FILE, json.dumps(asdict(self)))

    def check_unchanged(
        self, now: RunRecord, output: Path, tokenizer: Any, data: Mapping[str, tuple[GivenData, PreferenceDataset]]
    ) -> None:
        """Raise InputError if the tokens of a resumed run are not those that it was trained on."""
        for name, (_, groups) in data.items():
            if name not in self.data:
                continue
            before, after = self.data[name], now.data[name]
            difference = describe_difference(bytes.fromhex(before.digests), groups.digests, groups.group_ids)
            if difference is not None:
                raise InputError(
                    f"{after.source}: not the tokens that the run in {output} was trained on: {difference}; "
                    f"{self._cause(before, after, now, tokenizer)}"
                )

    def _cause(self, before: DataRecord, after: DataRecord, now: RunRecord, tokenizer: Any) -> str:
        anew = "or start a new run with another --output"
        if before.file_hash != after.file_hash:
            return f"the file was edited since; put it back as it was, {anew}"
        unchanged = "the dataset or the tokenizer changed" if before.file_hash is None else "the file is unchanged"
        if self.chat_template != now.chat_template:
            return f"{unchanged}, the tokenizer's chat template is another one; put it back, {anew}"
        if _READS_THE_DATE in (_template(tokenizer) or ""):
            return (
                f"{unchanged}, but the chat template writes the date ({_READS_THE_DATE}), so tokens change from day to "
                f"day: in the tokenizer's chat template, write the date of the run's start ({self.day}) in its place, "
                f"{anew}"
            )
        return f"{unchanged}; look for another version of the tokenizer's files, of tokenizers or of kvpref, {anew}"


def _template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else str(template)


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
