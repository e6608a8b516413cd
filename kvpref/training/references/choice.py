"""`References`: which reference a run has, where its log-probs come from, and what a checkpoint stores of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from kvpref.data import PreferenceDataset
from kvpref.engine.options import EngineOptions
from kvpref.errors import InputError
from kvpref.losses import PreferenceLoss
from kvpref.models.partitioned import has_partitioned
from kvpref.parallel.deepspeed import whole_weights
from kvpref.plan.batch import Batch
from kvpref.records.outputs import ResponseLogps
from kvpref.training.adapters import adapter_is_fresh, is_peft, trains_adapter_only
from kvpref.training.arguments import PreferenceTrainingArguments
from kvpref.training.loading.inputs import MicroBatchInputs
from kvpref.training.references.checks import check_reference_data, check_reference_settings, refuse_sharded
from kvpref.training.references.loading import load_reference_model
from kvpref.training.references.models import (
    AdapterOffReference,
    CopiedReference,
    ModelReference,
    SavedWeightsReference,
    Scoring,
    check_mixable,
    copy_model,
    mix_weights,
)
from kvpref.training.references.stored import StoredReference, stored_reference
from kvpref.training.row_groups import split_alike

CHECKPOINT_FILE = "reference.safetensors"
OwnWeights = CopiedReference | SavedWeightsReference


class References:
    """The reference of a run, made when first needed, before the weights change.

    Args:
        policy: Gives the trained model, without DistributedDataParallel; FSDP replaces the object.
        args: Which reference, and how it runs.
        loss: Decides whether it is needed, and at which temperature.
        options: Gives the engine's options; chunks may shrink when memory runs out.
        given: A second model, instead of `args.reference_model`.
        shard: Shards a second model like the policy; None if the policy is not sharded.

    Raises:
        InputError: If settings do not fit one another, the loss or the model.
    """

    def __init__(
        self,
        policy: Callable[[], nn.Module],
        args: PreferenceTrainingArguments,
        loss: PreferenceLoss,
        options: Callable[[], EngineOptions],
        given: nn.Module | None = None,
        *,
        shard: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        self._policy, self._args = policy, args
        self._needed = loss.needs_reference
        self._shard = shard
        self._scoring = Scoring.of(args, temperature=loss.head.temperature, options=options, autocasts=shard is None)
        self._given = args.reference_model if given is None else given
        self._home = None if given is None else next(given.parameters()).device
        self._stored: dict[str, StoredReference] = {}
        self._prepared: set[str] = set()
        self._model: ModelReference | None = None
        self._fingerprint: str | None = None
        if given is not None and args.reference_model is not None:
            raise InputError("two reference models: one in the arguments, one passed to the trainer; give only one")
        check_reference_settings(policy(), args, loss, self._given)

    @property
    def is_given(self) -> bool:
        """Whether the reference is a second model that the user named or handed over."""
        return self._given is not None

    # Log-probs

    def make_second(self) -> None:
        """Make a second model, if the run has one, while the policy's weights are whole."""
        is_copy = not (self._args.precompute_reference or is_peft(self._policy()))
        if self._needed and (self._given is not None or is_copy):
            self._reference()

    def prepare(self, name: str, dataset: PreferenceDataset | None) -> None:
        """Make the reference while the weights are still the initial ones, and precompute the log-probs of a dataset.

        Raises:
            InputError: As `stored_reference`; if the weights have changed since the reference was made; if the
                reference model cannot read the data.
        """
        if not self._needed or dataset is None or name in self._prepared:
            return
        reference = self._reference()
        self._check_readable(dataset, reference)
        if self._args.precompute_reference:
            self._check_unchanged(reference)
            folder = self._args.reference_logps_dir or Path(self._args.output_dir or ".") / "reference_logps"
            path = Path(folder) / f"{name}.safetensors"
            self._stored[name] = stored_reference(reference, dataset, self._args, path)
        self._prepared.add(name)

    def for_batch(self, name: str, inputs: MicroBatchInputs, batch: Batch) -> ResponseLogps | None:
        """Reference log-probs of a micro-batch of the dataset `name`; None if the loss reads none.

        They are computed now unless precomputed.
        """
        if not self._needed:
            return None
        source = self._stored[name] if name in self._stored else self._reference()
        return source.for_batch(inputs, batch)

    def check_can_score(self, dataset: PreferenceDataset) -> None:
        """Check that log-probs of a dataset that was not prepared can be computed now.

        Raises:
            InputError: If the reference is gone, or cannot read the data.
        """
        if not self._needed:
            return
        reference = self._reference()
        self._check_readable(dataset, reference)
        self._check_unchanged(reference)

    def release(self) -> None:
        """Release a second model whose log-probs are all precomputed; a user's model moves back to its device."""
        if self._args.precompute_reference and self._given is not None and self._model is not None:
            if isinstance(self._given, nn.Module) and self._shard is None:
                self._given.to(self._home)
            self._model = None

    def whole_weights(self) -> AbstractContextManager[None]:
        """While open, ranks may compute log-probs of different numbers of micro-batches, also with ZeRO-3's weights."""
        return nullcontext() if self._model is None else whole_weights(self._model.model_of())

    # Which reference

    def _reference(self) -> ModelReference:
        if self._model is None:
            self._model = self._make()
            self._fingerprint = self._model.fingerprint
        return self._model

    def _make(self) -> ModelReference:
        args, policy = self._args, self._policy()
        if self._given is not None:
            return self._second(load_reference_model(self._given, policy, self._loading_device()))
        if is_peft(policy):
            is_off = args.reference == "base" or adapter_is_fresh(policy)
            stays_off = args.precompute_reference or (args.reference_sync_steps is None and trains_adapter_only(policy))
            if is_off and stays_off:
                return AdapterOffReference(self._policy, args.device, self._scoring)
            if not args.precompute_reference:
                refuse_sharded(policy, "a copy of the adapter as the reference")
                return SavedWeightsReference(self._policy, args.device, self._scoring)
        if args.precompute_reference:
            return ModelReference(self._policy, args.device, self._scoring)
        if has_partitioned(policy):
            raise InputError(
                "a copy of the model as the reference needs whole weights, and ZeRO-3 has them in pieces; use "
                "precomputed reference log-probs (precompute_reference=True), or name the model's folder as "
                "reference_model"
            )
        device = self._loading_device()
        return self._second(load_reference_model(copy_model(policy, device), policy, device))

    def _second(self, model: nn.Module) -> CopiedReference:
        if self._device().type == self._args.device.type:
            split_alike(model, self._policy())
        if self._shard is not None:
            model = self._shard(model)
        reference = CopiedReference(lambda: model, self._device(), self._scoring)
        if self._args.reference_sync_steps is not None:
            check_mixable(reference.weights(), self._policy())
        return reference

    def _loading_device(self) -> torch.device:
        """The device on which a second model is loaded: the final one, or one from which sharding moves pieces."""
        return self._device() if self._shard is None else torch.device("cpu")

    def _device(self) -> torch.device:
        if self._args.reference_device is None:
            return self._args.device
        device = torch.device(self._args.reference_device)
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def _check_readable(self, dataset: PreferenceDataset, reference: ModelReference) -> None:
        if self._given is not None:
            check_reference_data(dataset, reference.model_of(), self._policy())

    def _check_unchanged(self, reference: ModelReference) -> None:
        if not isinstance(reference, OwnWeights) and not reference.is_unchanged():
            raise InputError(
                "the reference is the model as it was before training, which is gone, and this dataset's log-probs "
                "were not computed then; pass it to PreferenceTrainer as eval_dataset, or set "
                "precompute_reference=False to keep a copy of the model"
            )

    # Reference sync and checkpoints

    def sync(self) -> None:
        """Update the reference towards the policy by `reference_sync_alpha`."""
        mix_weights(self._own_weights(), self._policy(), self._args.reference_sync_alpha)

    def save(self, folder: Path) -> None:
        """Write to a checkpoint which reference the run has, and its weights if they follow the policy's."""
        if self._fingerprint is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        if self._args.reference_sync_steps is not None:
            tensors = {name: tensor.contiguous() for name, tensor in self._own_weights().items()}
        save_file(tensors, folder / CHECKPOINT_FILE, metadata={"model": self._fingerprint})

    def load(self, folder: Path) -> None:
        """Restore the reference of a checkpoint.

        Raises:
            InputError: If the checkpoint's run had another reference, or its file is missing or cannot be read.
        """
        path, syncs = folder / CHECKPOINT_FILE, self._args.reference_sync_steps is not None
        if not self._needed or (not syncs and not path.exists()):
            return  # written by a version that kept no such file
        try:
            with safe_open(path, framework="pt") as file:
                fingerprint = (file.metadata() or {}).get("model")
                found: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: cannot read the reference that this run resumes with: {error}") from error
        if fingerprint != self._fingerprint:
            raise InputError(
                f"{path}: this checkpoint's run had another reference; resume with the model (or reference_model) that "
                "the run started from, not with the checkpoint's"
            )
        if bool(found) != syncs:
            raise InputError(f"{path}: resume with the reference_sync_steps that this checkpoint's run had")
        if syncs:
            self._restore(found, path)

    def _restore(self, found: dict[str, torch.Tensor], path: Path) -> None:
        weights = self._own_weights()
        if {name: tensor.shape for name, tensor in found.items()} != {n: w.shape for n, w in weights.items()}:
            raise InputError(f"{path}: holds other weights than the reference model's")
        for name, weight in weights.items():
            weight.copy_(found[name])

    def _own_weights(self) -> dict[str, torch.Tensor]:
        reference = self._reference()
        assert isinstance(reference, OwnWeights)
        return reference.weights()
