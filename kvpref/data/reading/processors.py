"""Processors of models that see images; a tokenizer if there is nothing more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpref.data.reading.tokenization import load_tokenizer
from kvpref.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

_FILES = ("processor_config.json", "preprocessor_config.json")
"""Files that name the class of a processor, in the order in which transformers looks."""

_VIDEO = "video_processor"
_VIDEO_FILE = "video_preprocessor_config.json"


def load_processor(name: str) -> PreTrainedTokenizerBase | ProcessorMixin:
    """Load the processor of a folder or hub name, or its tokenizer if it has no processor for images.

    Processors that also read videos are loaded without that part if torchvision, which it needs, is missing.

    Raises:
        InputError: If there is neither, or the processor cannot be loaded.
    """
    from transformers import AutoProcessor
    from transformers.utils.import_utils import is_torchvision_available

    found = [_read_file(name, file) for file in _FILES]
    if not any(found):
        return load_tokenizer(name)
    class_name = next((values["processor_class"] for values in found if values.get("processor_class")), None)
    try:
        kind = None if is_torchvision_available() else _without_videos(class_name)
        processor = AutoProcessor.from_pretrained(name) if kind is None else kind.from_pretrained(name)
    except Exception as error:  # transformers raises errors of many classes for a name it cannot load
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name}: its processor cannot be loaded ({reason})") from error
    if getattr(processor, "image_processor", None) is None:
        return load_tokenizer(name)
    if kind is not None:
        processor.unread_videos = found[0].get(_VIDEO) or _read_file(name, _VIDEO_FILE) or None
    return processor


def _read_file(name: str, file: str) -> dict[str, Any]:
    """A JSON file of a folder or hub repository; empty if there is none."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(
            name,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        values = {} if path is None else json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _without_videos(class_name: str | None) -> Any:
    """The class of this name without its video part; None for classes that have none or are unknown."""
    from transformers.models.auto.processing_auto import processor_class_from_name

    kind: Any = None if class_name is None else processor_class_from_name(class_name)
    if kind is None or _VIDEO not in kind.get_attributes():
        return None
    return globals().get(kind.__name__) or _make(kind)


def _make(kind: Any) -> Any:
    parts = [part for part in kind.get_attributes() if part != _VIDEO]

    def to_dict(self: Any) -> dict[str, Any]:
        """Include the settings of the unread part, so that transformers finds them if torchvision is installed."""
        values: dict[str, Any] = kind.to_dict(self)
        kept = getattr(self, "unread_videos", None)
        return values if kept is None else values | {_VIDEO: kept}

    def from_args_and_dict(cls: Any, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        values = {name: value for name, value in processor_dict.items() if name != _VIDEO}
        return kind.from_args_and_dict.__func__(cls, args, values, **kwargs)

    changes: dict[str, Any] = {
        "__module__": __name__,
        "get_attributes": classmethod(lambda cls: parts),
        "from_args_and_dict": classmethod(from_args_and_dict),  # type: ignore[arg-type]
        "to_dict": to_dict,
    }
    made = globals()[kind.__name__] = type(kind.__name__, (kind,), changes)
    return made


def __getattr__(name: str) -> Any:
    """Classes without videos by name, for pickles made by another process."""
    made = _without_videos(name) if name.endswith("Processor") else None
    if made is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return made
