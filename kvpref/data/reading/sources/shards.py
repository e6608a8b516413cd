"""Files of one dataset: in a folder, by their splits, or all that match a pattern."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from glob import escape, glob, has_magic
from pathlib import Path

from kvpref.data.reading.sources.packed import PACKED, inner_suffix
from kvpref.errors import InputError

_NOT_DATA = frozenset(
    {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "README.md"}
)
"""What `datasets` does not take for data either."""

_NUMBERED = re.compile(r"(\w[\w.]*)-\d{5}-of-\d{5}\b")
"""The names of shards as `datasets` and the hub write them."""

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Which words in a name stand for which split, as `datasets` has them."""


def find_splits(folder: Path, known: Mapping[str, str]) -> dict[str, list[Path]]:
    """The data files in a folder and those below it, sorted, by split.

    The splits are those that `datasets` finds: ``SPLIT-00000-of-00001``, where all files are named so; else by words
    such as ``train`` or ``dev`` in the names of folders and files; else all files are ``train``.

    Args:
        folder: To look in; names that begin with a dot or two underscores are passed over.
        known: Per suffix what kind of file it is.

    Raises:
        InputError: If some files are named after splits and others are not.
    """
    files = [path for path in sorted(folder.rglob("*")) if _is_data(path, folder, known)]
    numbered = [_NUMBERED.match(path.name) for path in files]
    splits: dict[str, list[Path]] = defaultdict(list)
    if all(numbered):
        for path, match in zip(files, numbered, strict=True):
            assert match is not None
            splits[match[1]].append(path)
        return splits
    by_word = {path: _split_by_word(path.relative_to(folder)) for path in files}
    unclear = [path for path, split in by_word.items() if split is None]
    if unclear and len(unclear) < len(files):
        other = next(path for path, split in by_word.items() if split is not None)
        raise InputError(
            f"{folder}: {other.relative_to(folder)} is named after a split and {unclear[0].relative_to(folder)} is "
            f"not; say which files are meant, as in '{folder}/*{unclear[0].suffix}'"
        )
    for path, split in by_word.items():
        splits[split or "train"].append(path)
    return splits


def match_files(pattern: str) -> list[Path]:
    """The files that match a pattern, sorted; ``**`` stands for any folders.

    Raises:
        InputError: If there is none.
    """
    files = [path for path in map(Path, sorted(glob(pattern, recursive=True))) if path.is_file()]
    if not files:
        raise InputError(f"{pattern}: no file matches; check the pattern, and put it in quotes on the command line")
    return files


def pattern_folder(pattern: str) -> Path:
    """The folder that a pattern begins with."""
    parts = Path(pattern).parts
    fixed = next((index for index, part in enumerate(parts) if has_magic(part)), len(parts))
    return Path(*parts[:fixed])


def one_kind(files: Iterable[Path], known: Mapping[str, str], source: str) -> str:
    """The suffix by which all files are read.

    Raises:
        InputError: If they are of different kinds, or one is of none that is known.
    """
    suffixes: dict[str, tuple[str, Path]] = {}
    for path in files:
        suffix = inner_suffix(path)
        if suffix not in known:
            refuse_kind(path, known)
        suffixes.setdefault(known[suffix], (suffix, path))
    if len(suffixes) > 1:
        found = " and ".join(f"{kind} ({path.name})" for kind, (_, path) in suffixes.items())
        pattern = f"{escape(str(Path(source)))}/**/*.jsonl" if Path(source).is_dir() else "DATA/*.jsonl"
        raise InputError(f"{source}: files of different kinds: {found}; name those of one kind, as in '{pattern}'")
    return next(iter(suffixes.values()))[0]


def refuse_kind(path: Path, known: Mapping[str, str]) -> None:
    """Raise InputError for a file that cannot be read by its name."""
    if path.suffix.lower() in PACKED:
        raise InputError(
            f"{path}: a packed file that is not read; unpack it, pack lines as .jsonl.gz, or save .parquet"
        )
    raise InputError(f"{path}: unknown file type {path.suffix!r}; rename the file to one of {', '.join(known)}")


def _is_data(path: Path, folder: Path, known: Mapping[str, str]) -> bool:
    inside = path.relative_to(folder).parts
    if any(part.startswith((".", "__")) for part in inside) or path.name in _NOT_DATA:
        return False
    # A packed file is named among others, and then refused.
    suffixes = {inner_suffix(path), Path(path.stem).suffix.lower()}
    return bool(suffixes & known.keys()) and path.is_file()


def _split_by_word(path: Path) -> str | None:
    for part in (*path.parent.parts, path.name):
        for split, words in _KEYWORDS.items():
            if re.search(rf"(?:^|[-._ 0-9])(?:{'|'.join(words)})(?:[-._ 0-9]|$)", part, re.IGNORECASE):
                return split
    return None
