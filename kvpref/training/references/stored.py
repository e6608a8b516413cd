"""Reference log-probs of whole datasets: computed once, stored, and refused if model or data changed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from kvpref.data import PreferenceDataset
from kvpref.data.digests import describe_difference
from kvpref.errors import InputError, RunError
from kvpref.parallel.deepspeed import whole_weights
from kvpref.parallel.gathering import gather
from kvpref.plan.batch import Batch
from kvpref.records.host_copies import to_device
from kvpref.records.outputs import ResponseLogps
from kvpref.training.arguments import PreferenceTrainingArguments
from kvpref.training.loading.batcher import make_batcher
from kvpref.training.loading.inputs import MicroBatchInputs
from kvpref.training.loading.loader import make_loader
from kvpref.training.references.models import ModelReference


class StoredReference:
    """Reference log-probs of every scored token of a dataset.

    Args:
        token_logps: (num_scored_tokens,) float32 (float64 for a float64 model) on the CPU, sequence after sequence in
            the dataset's order.
        lengths: Scored tokens per sequence, per group.
    """

    def __init__(self, token_logps: torch.Tensor, lengths: list[list[int]]) -> None:
        self.token_logps = token_logps
        self._spans: list[tuple[int, int]] = []
        start = 0
        for group in lengths:
            self._spans.append((start, start + sum(group)))
            start += sum(group)

    def for_batch(self, inputs: MicroBatchInputs, batch: Batch) -> ResponseLogps:
        """As in `ReferenceSource`."""
        parts = [self.token_logps[slice(*self._spans[index])] for index in inputs.group_indices]
        return ResponseLogps(
            token_logps=to_device(torch.cat(parts), batch.device),
            cu_seqlens=batch.cu_seqlens,
            group_index=batch.group_index,
            weights=batch.token_weights(self.token_logps.dtype),
        )


def stored_reference(
    reference: ModelReference, groups: PreferenceDataset, args: PreferenceTrainingArguments, path: Path
) -> StoredReference:
    """Read the reference log-probs at `path`, or compute them with `reference` and store them there.

    Raises:
        InputError: If the file was made with another model, other data, or at another temperature or precision, or
            cannot be read.
    """
    lengths = [[sequence.total_scored for sequence in group.sequences] for group in groups]
    fingerprints = {
        "data": groups.fingerprint,
        "model": reference.fingerprint,
        "temperature": str(float(reference.scoring.temperature)),
        "precision": str(reference.scoring.precision),
    }
    if path.exists():
        token_logps = _read(path, fingerprints, groups)
    else:
        token_logps = _compute(reference, groups, args, lengths)
        if args.process_index == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            tensors = {
                "token_logps": token_logps,
                "digests": torch.frombuffer(bytearray(groups.digests), dtype=torch.uint8),
            }
            try:
                save_file(tensors, partial, metadata=fingerprints)
                partial.rename(path)  # a run killed while writing leaves no partial file under the real name
            except (OSError, SafetensorError) as error:
                partial.unlink(missing_ok=True)
                raise RunError(
                    f"cannot write the reference log-probs to {path}: {error}; make room, then start the run again"
                ) from error
    return StoredReference(token_logps, lengths)


def _read(path: Path, fingerprints: dict[str, str], groups: PreferenceDataset) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            token_logps: torch.Tensor = file.get_tensor("token_logps")
            digests: torch.Tensor = file.get_tensor("digests")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: cannot read reference log-probs ({error}); delete the file to recompute them"
        ) from error
    for what, fingerprint in fingerprints.items():
        if stored.get(what) != fingerprint:
            difference = None
            if what == "data":
                difference = describe_difference(digests.numpy().tobytes(), groups.digests, groups.group_ids)
            raise InputError(
                f"{path}: these reference log-probs were made with another {what}"
                f"{'' if difference is None else f' ({difference})'}; delete the file to recompute them, or choose "
                "another reference_logps_dir"
            )
    return token_logps


def _compute(
    reference: ModelReference,
    groups: PreferenceDataset,
    args: PreferenceTrainingArguments,
    lengths: list[list[int]],
) -> torch.Tensor:
    batcher = make_batcher(groups, args, groups_per_device=args.per_device_train_batch_size, shuffle=False)
    found: dict[int, torch.Tensor] = {}
    with whole_weights(reference.model_of()):
        for step in _with_progress(make_loader(groups, batcher, args), args):
            for inputs in step:
                token_logps = reference.for_batch(inputs, inputs.batch.to(args.device)).token_logps.cpu()
                parts = token_logps.split([sum(lengths[index]) for index in inputs.group_indices])
                found.update(zip(inputs.group_indices, parts, strict=True))
    of_all = {index: logps for rank in gather(found, args.world_size) for index, logps in rank.items()}
    return torch.cat([of_all[index] for index in range(len(groups))])


def _with_progress(loader: DataLoader[Any], args: PreferenceTrainingArguments) -> Iterable[Any]:
    if args.disable_tqdm or args.process_index != 0:
        return loader
    return track(loader, description="reference log-probs", console=Console(stderr=True))
