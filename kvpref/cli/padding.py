"""A pad token for reward models, which transformers reads at the last token of a row that is not the pad token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from kvpref.cli.loading import num_embeddings
from kvpref.data.reading.response_spans import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from kvpref.data import PreferenceDataset

PAD_TOKEN = "<|pad|>"
_SPARE_NAMES = ("pad", "reserved", "unused")
"""Parts of the names of tokens that occur in no text."""


def set_pad_token(
    model: PreTrainedModel,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    datasets: Iterable[PreferenceDataset],
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Give tokenizer and model a pad token that no text contains; kvpref itself pads nothing.

    In this order: the tokenizer's own; a reserved one; `PAD_TOKEN`, added in a spare row of the embeddings; the same
    with a new row. The base model of an adapter gets no new row: the adapter would have to save all embeddings, and
    would no longer fit its base. Instead the unknown token, another special token or one of the last of the vocabulary
    is taken if the data does not use it; or none.

    Args:
        model: A model with a scalar head, possibly inside PEFT.
        processing: Its tokenizer or processor, which is saved with it. An adapter is saved without its base model's
            configuration, so that only the tokenizer keeps the choice.
        datasets: The training and evaluation data.
        report: Takes a line if the token is not the tokenizer's own.
    """
    tokenizer = tokenizer_of(processing)
    used = _end_tokens(model, tokenizer).union(*(dataset.token_ids() for dataset in datasets))
    has_adapter = hasattr(model, "peft_config")
    own = tokenizer.pad_token_id
    if own is None or own in used or own == tokenizer.unk_token_id:
        spare = next((token for token in _reserved(tokenizer) if token not in used), None)
        has_row = len(tokenizer) < num_embeddings(model) and PAD_TOKEN not in tokenizer.get_vocab()
        if spare is None and (has_row or not has_adapter):
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
            if len(tokenizer) > num_embeddings(model):
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            report(f"padding: {PAD_TOKEN}, added as token {tokenizer.pad_token_id}; the tokenizer had none of its own")
        else:
            if spare is None:
                spare = next((token for token in _last_resorts(tokenizer) if token not in used), None)
            _take(tokenizer, spare, report)
    for config in (model.config, model.config.get_text_config()):  # the same object, except for models that see images
        config.pad_token_id = tokenizer.pad_token_id


def _take(tokenizer: PreTrainedTokenizerBase, token_id: int | None, report: Callable[[str], None]) -> None:
    if token_id is None:
        tokenizer.pad_token = None
        report(
            "every token of the tokenizer occurs in the data, so none is left for padding: rewards of padded batches "
            "are refused by transformers; kvpref needs no padding"
        )
        return
    token = tokenizer.convert_ids_to_tokens(token_id)
    tokenizer.pad_token = token
    report(f"padding: {token!r} (token {token_id}), which the data lacks; the tokenizer had no token of its own for it")


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that a text may end or begin with."""
    found: set[Any] = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    for settings in (model.config, getattr(model, "generation_config", None)):
        ends = getattr(settings, "eos_token_id", None)
        found.update(ends if isinstance(ends, list | tuple) else [ends])
    return {token for token in found if token is not None}


def _reserved(tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Added tokens named pad, reserved or unused, last first."""
    for token_id, token in sorted(tokenizer.added_tokens_decoder.items(), reverse=True):
        if any(name in str(token).lower() for name in _SPARE_NAMES):
            yield token_id


def _last_resorts(tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """The unknown token, special tokens that the chat template does not write, and the vocabulary from its end."""
    if tokenizer.unk_token_id is not None:
        yield tokenizer.unk_token_id
    template = str(tokenizer.chat_template or "")
    written = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if str(token) in template}
    ordinary = sorted(set(tokenizer.get_vocab().values()) - tokenizer.added_tokens_decoder.keys(), reverse=True)
    for token_id in (*sorted(tokenizer.added_tokens_decoder, reverse=True), *ordinary):
        if token_id not in written:
            yield token_id
